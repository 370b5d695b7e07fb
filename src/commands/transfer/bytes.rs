//! The bytes of attachments, from a folder into the storage of the new servers.

use std::time::Duration;

use anyhow::{Context, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};

use crate::blobs::{Blob, BlobError, Blobs, ReadOnlyFolder, UploadError};
use crate::commands::transfer::report::Report;
use crate::model::ids::AttachmentId;
use crate::store::transfer::{BYTES_OF_ATTACHMENTS, BytesProgress, Transfer};

/// Attachments under way at the same time. Of each only a piece is in memory.
const AT_ONCE: usize = 8;
/// The longest time that one attachment may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// Attachments below this size go up in one piece, or not at all.
const LARGE: u64 = 1 << 20;
/// What to do when the new storage fails.
const REPEAT: &str =
    "the target's storage failed; once that is settled, run the same command again, and it goes on where it stopped";

/// Where they come from and where they go.
pub(super) struct Bytes {
    pub(super) from: ReadOnlyFolder,
    pub(super) to: Blobs,
}

/// What came of comparing an attachment.
enum Compared {
    Same,
    Differ,
    /// It is missing from the source, or cut short there.
    Lost,
}

impl Bytes {
    /// Copies those that have not arrived yet. One that is missing from the source or cut short there is passed over:
    /// no client could download it there either, so it is no reason to stay. `verify` counts those.
    pub(super) async fn copy(&self, transfer: &mut Transfer, report: &mut Report) -> anyhow::Result<()> {
        let all = transfer.attachment_count().await?;
        let mut progress = transfer.bytes_progress().await?;
        loop {
            let attachments = transfer.attachments(progress.last).await?;
            let Some((last, _)) = attachments.last() else { return Ok(()) };
            progress.last = Some(*last);
            progress.copied += attachments.len() as u64;
            let copying = stream::iter(attachments).map(|(id, size)| in_time(self.copy_one(id, size)));
            copying.buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
            transfer.note_bytes(&progress).await?;
            report.step(BYTES_OF_ATTACHMENTS, progress.copied, all);
        }
    }

    /// Reads all of them on both sides. Answers how many are the same, and how many are missing from the source or cut
    /// short there. When the target lacks one or has it differently, the next run copies all of them once more.
    pub(super) async fn verify(&self, transfer: &mut Transfer, report: &mut Report) -> anyhow::Result<(u64, u64)> {
        let all = transfer.attachment_count().await?;
        let (mut last, mut same, mut differ, mut lost) = (None, 0, 0, 0);
        loop {
            let attachments = transfer.attachments(last).await?;
            let Some((id, _)) = attachments.last() else { break };
            last = Some(*id);
            let comparing = stream::iter(attachments).map(|(id, size)| in_time(self.compare_one(id, size)));
            let compared: Vec<Compared> = comparing.buffer_unordered(AT_ONCE).try_collect().await?;
            for one in compared {
                match one {
                    Compared::Same => same += 1,
                    Compared::Differ => differ += 1,
                    Compared::Lost => lost += 1,
                }
            }
            report.step(BYTES_OF_ATTACHMENTS, same + differ + lost, all);
        }
        if lost > 0 && lost == all {
            let folder = self.from.path().display();
            bail!(
                "none of the {all} attachments is in {folder}; name their folder with --attachments-from, or what their \
                 names begin with in it with --attachment-prefix"
            );
        }
        if differ > 0 {
            transfer.note_bytes(&BytesProgress { last: None, copied: 0 }).await?;
            bail!(
                "the bytes of attachments differ: {differ} of {all} are missing from the new storage or differ there; \
                 find out who else writes to it, and run the same command again, which copies all of them once more"
            );
        }
        Ok((same, lost))
    }

    async fn copy_one(&self, id: AttachmentId, size: u64) -> anyhow::Result<()> {
        let Some(found) = self.whole(id, size).await? else { return Ok(()) };
        if size >= LARGE {
            // An attempt that was killed may have left parts of it.
            if let Some((_, error)) = self.to.discard(&[id]).await.failed {
                return Err(anyhow::Error::new(error).context(REPEAT));
            }
        }
        let staged = self.to.stage(id, size, found.bytes).await.map_err(|error| match error {
            UploadError::Body => anyhow::Error::msg("an attachment could not be read to its end in the source"),
            UploadError::Storage(error) => anyhow::Error::new(error).context(REPEAT),
            UploadError::NoRoom => anyhow::Error::msg(REPEAT),
        })?;
        staged.publish().await.context(REPEAT)
    }

    async fn compare_one(&self, id: AttachmentId, size: u64) -> anyhow::Result<Compared> {
        let Some(here) = self.whole(id, size).await? else { return Ok(Compared::Lost) };
        let there = self.to.read(id, None).await.context(REPEAT)?;
        let Some(there) = there.filter(|there| there.size == size) else { return Ok(Compared::Differ) };
        let here = checksum(here).await.context("the attachments of the source can't be read")?;
        let there = checksum(there).await.context(REPEAT)?;
        Ok(if here == there { Compared::Same } else { Compared::Differ })
    }

    /// An attachment of the source. `None` when it is missing or cut short.
    async fn whole(&self, id: AttachmentId, size: u64) -> anyhow::Result<Option<Blob>> {
        let found = self.from.read(id).await.context("the attachments of the source can't be read")?;
        Ok(found.filter(|found| found.size == size))
    }
}

async fn checksum(mut blob: Blob) -> Result<[u8; 32], BlobError> {
    let mut hash = Sha256::new();
    while let Some(bytes) = blob.bytes.next().await {
        hash.update(bytes?);
    }
    Ok(hash.finalize().into())
}

async fn in_time<T>(one: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(LIMIT, one).await.context("an attachment took longer than half an hour; run this again")?
}
