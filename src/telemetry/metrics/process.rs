//! What this process uses, as Linux tells it.

use std::fs;

/// What the process has used and is using.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Time of its own on processors.
    pub user_ticks: u64,
    /// The kernel's on its behalf.
    pub system_ticks: u64,
    /// How long a tick is.
    pub ticks_per_second: u64,
    /// Memory.
    pub resident_bytes: u64,
    /// Files and connections.
    pub open_files: u64,
}

impl Used {
    /// As it is now; `None` where there is no `/proc`. It takes some microseconds, with an old kernel more with each
    /// open file.
    pub fn now() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name may have spaces; what follows it has none. The first field behind it is the third of all.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            user_ticks: field(14)?,
            system_ticks: field(15)?,
            ticks_per_second: rustix::param::clock_ticks_per_second(),
            resident_bytes: field(24)? * rustix::param::page_size() as u64,
            open_files: open_files()?,
        })
    }
}

/// Newer kernels tell the number as the size of the folder.
fn open_files() -> Option<u64> {
    match fs::metadata("/proc/self/fd").ok()?.len() {
        0 => Some(fs::read_dir("/proc/self/fd").ok()?.count() as u64),
        number => Some(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests of this process open and close files at the same time, so only what is surely there can be asked for.
    #[test]
    fn what_a_process_uses_is_told() {
        let before = Used::now().unwrap();
        let (files, memory): (Vec<_>, _) =
            ((0..300).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect(), vec![7_u8; 64 << 20]);
        let after = Used::now().unwrap();
        assert!(after.open_files >= 300, "{after:?}");
        assert!(after.resident_bytes >= 64 << 20, "{after:?}");
        assert!(after.user_ticks + after.system_ticks >= before.user_ticks + before.system_ticks);
        drop((files, memory));
    }
}
