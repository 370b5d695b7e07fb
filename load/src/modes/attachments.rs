//! Bytes up and down, beside plain copies on the same disk.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use crate::figures::Figures;
use crate::http::{Connection, bearer};
use crate::job::Job;
use crate::people::{Device, register};
use crate::sender::random_bytes;
use crate::server::Server;

const MIB: f64 = 1_048_576.0;

pub async fn measure(job: &Job, server: &Server) -> Result<Figures> {
    let options = &job.options;
    let mut figures = Figures::default();
    let (at_once, size) = (options.connections, options.size);
    let count = options.volume.div_ceil(size).max(at_once);
    let volume = (count * size) as f64 / MIB;
    job.phase("signing up", server);
    let devices: Arc<[Device]> = register(server.api, at_once).await?.into();
    let bytes: Arc<[u8]> = random_bytes(size).into();
    server.add_memory(&mut figures, "before");

    // Half of the copies before, half behind, so that a disk that changes its mind does not favour one side.
    job.phase("copying", server);
    let folder = tempfile::Builder::new().prefix("obscura-load-copies-").tempdir_in(&options.parent)?;
    let half = count.div_ceil(2);
    let mut copying = copy(folder.path(), &bytes, 0..half, at_once).await?;

    job.phase("uploading", server);
    let is_peak_known = server.forget_peak();
    job.watch.begin();
    let meter = job.meter(server);
    let began = Instant::now();
    let ids = upload(job, server, &devices, &bytes, count).await?;
    let uploads = volume / began.elapsed().as_secs_f64();
    meter.read().add_to(&mut figures, "upload", count as u64);
    let up = job.watch.end();
    if is_peak_known {
        server.add_peak(&mut figures, "most while uploading");
    }

    job.phase("downloading", server);
    let is_peak_known = server.forget_peak();
    job.watch.begin();
    let meter = job.meter(server);
    let began = Instant::now();
    download(job, server, &devices, &bytes, ids.into()).await?;
    let downloads = volume / began.elapsed().as_secs_f64();
    meter.read().add_to(&mut figures, "download", count as u64);
    let down = job.watch.end();
    if is_peak_known {
        server.add_peak(&mut figures, "most while downloading");
    }

    job.phase("copying", server);
    copying += copy(folder.path(), &bytes, half..count, at_once).await?;
    job.put_away([folder]);
    let copies = volume / copying;
    figures.add("upload_mib_per_s", uploads);
    figures.add("download_mib_per_s", downloads);
    figures.add("copy_mib_per_s", copies);
    figures.add("upload_ratio", uploads / copies);
    figures.add("download_ratio", downloads / copies);
    figures.add_latencies("upload", &up);
    figures.add_latencies("download", &down);
    // Every one was compared, or the measurement would have ended.
    figures.add("fetched", count as f64);
    server.add_memory(&mut figures, "after");
    figures.curve = Some(up);
    Ok(figures)
}

async fn upload(
    job: &Job,
    server: &Server,
    devices: &[Device],
    bytes: &Arc<[u8]>,
    count: usize,
) -> Result<Vec<String>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut work = JoinSet::new();
    for device in devices {
        let (bytes, next, watch) = (bytes.clone(), next.clone(), job.watch.clone());
        let (mut connection, token) = (Connection::open(server.api).await?, device.token.clone());
        work.spawn(async move {
            let mut ids = Vec::new();
            while next.fetch_add(1, Ordering::Relaxed) < count {
                let began = Instant::now();
                ids.push(upload_one(&mut connection, &token, &bytes).await?);
                watch.record(began.elapsed());
            }
            anyhow::Ok(ids)
        });
    }
    Ok(work.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// Answers the id of the attachment.
pub async fn upload_one(connection: &mut Connection, token: &str, bytes: &[u8]) -> Result<String> {
    let answer = connection.request("POST", "/v1/attachments", &bearer(token), bytes).await?.json(201)?;
    Ok(answer["id"].as_str().context("no id of an attachment")?.to_owned())
}

async fn download(job: &Job, server: &Server, devices: &[Device], bytes: &Arc<[u8]>, ids: Arc<[String]>) -> Result<()> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut work = JoinSet::new();
    for device in devices {
        let (bytes, next, watch, ids) = (bytes.clone(), next.clone(), job.watch.clone(), ids.clone());
        let (mut connection, token) = (Connection::open(server.api).await?, device.token.clone());
        work.spawn(async move {
            while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
                let began = Instant::now();
                connection.download(&format!("/v1/attachments/{id}"), &token, &bytes).await?;
                watch.record(began.elapsed());
            }
            anyhow::Ok(())
        });
    }
    work.join_all().await.into_iter().collect()
}

/// Makes a copy of a file for each number, several at once, each confirmed by the disk. Answers how many seconds it took.
async fn copy(folder: &Path, bytes: &[u8], copies: Range<usize>, at_once: usize) -> Result<f64> {
    let source = folder.join("source");
    std::fs::write(&source, bytes)?;
    let next = Arc::new(AtomicUsize::new(copies.start));
    let mut work = JoinSet::new();
    let began = Instant::now();
    for _ in 0..at_once {
        let (folder, source, next) = (folder.to_owned(), source.clone(), next.clone());
        work.spawn_blocking(move || {
            let mut buffer = vec![0; 256 << 10];
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= copies.end {
                    return anyhow::Ok(());
                }
                // Not by the system's own call for copies, which may let both files share their blocks.
                let (mut from, mut to) = (File::open(&source)?, File::create(folder.join(n.to_string()))?);
                loop {
                    let read = from.read(&mut buffer)?;
                    if read == 0 {
                        break;
                    }
                    to.write_all(&buffer[..read])?;
                }
                to.sync_all()?;
            }
        });
    }
    work.join_all().await.into_iter().collect::<Result<()>>()?;
    Ok(began.elapsed().as_secs_f64())
}
