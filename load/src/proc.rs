//! What `/proc` knows about processes and the machine.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// Linux counts CPU time for users in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process, as its line in `/proc/PID/stat` tells.
struct Stat {
    parent: u32,
    /// Its own time and that of its children that have ended, in ticks.
    ticks: f64,
}

/// Seconds of CPU that a process, its children and theirs have used. Children that have ended count too.
pub fn cpu_seconds(process: u32) -> Option<f64> {
    let mut ticks = stat(process)?.ticks;
    let mut children: HashMap<u32, Vec<(u32, f64)>> = HashMap::new();
    let numbers = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers {
        if let Some(stat) = stat(number) {
            children.entry(stat.parent).or_default().push((number, stat.ticks));
        }
    }
    let mut families = vec![process];
    while let Some(parent) = families.pop() {
        for (child, used) in children.remove(&parent).unwrap_or_default() {
            ticks += used;
            families.push(child);
        }
    }
    Some(ticks / TICKS_PER_SECOND)
}

/// Seconds of CPU of one process by itself, which costs less to find out.
pub fn own_cpu_seconds(process: u32) -> Option<f64> {
    Some(stat(process)?.ticks / TICKS_PER_SECOND)
}

fn stat(process: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: Option<f64> = fields.get(11..15)?.iter().map(|ticks| ticks.parse::<f64>().ok()).sum();
    Some(Stat { parent: fields.get(1)?.parse().ok()?, ticks: ticks? })
}

/// KiB of memory in use: all, and without the parts that are files.
pub fn resident_kib(process: u32) -> Option<(f64, f64)> {
    Some((status(process, "VmRSS:")?, status(process, "RssAnon:")?))
}

/// The most KiB of memory that were in use at any moment since [`forget_peak`].
pub fn peak_kib(process: u32) -> Option<f64> {
    status(process, "VmHWM:")
}

/// False when it may not be, because the process belongs to another user.
pub fn forget_peak(process: u32) -> bool {
    fs::write(format!("/proc/{process}/clear_refs"), "5").is_ok()
}

fn status(process: u32, name: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// How many files this process may have open.
pub fn open_files() -> usize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    line.split_whitespace().nth(3).and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX)
}

/// How busy the machine has been in the last minute.
pub fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}

/// The kind of file system that this folder is on.
fn file_system(folder: &Path) -> Option<String> {
    let folder = folder.canonicalize().ok()?;
    // Where it is mounted is the second word, the kind is the third.
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let around = mounts.filter(|words| words.get(1).is_some_and(|place| folder.starts_with(place)));
    let nearest = around.max_by_key(|words| words[1].len())?;
    Some((*nearest.get(2)?).to_owned())
}

/// What the figures were found on; the servers' folders are in this one.
pub fn machine(folder: &Path) -> Value {
    let value = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name));
        line.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let memory = value("/proc/meminfo", "MemTotal");
    let memory: u64 = memory.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
    json!({
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": value("/proc/cpuinfo", "model name"),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "memory_mib": memory / 1024,
        "file_system": file_system(folder),
        "load_average": load_average(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen_until_it_is_forgotten() {
        let myself = std::process::id();
        drop(std::hint::black_box(vec![1_u8; 64 << 20]));
        let peak = peak_kib(myself).unwrap();
        assert!(peak > 65_536.0, "{peak}");
        assert!(forget_peak(myself));
        assert!(peak_kib(myself).unwrap() < peak);
    }

    #[test]
    fn a_child_that_has_ended_still_counts() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"])
            .spawn()
            .unwrap();
        let before = cpu_seconds(std::process::id()).unwrap();
        child.wait().unwrap();
        assert!(cpu_seconds(std::process::id()).unwrap() >= before);
        assert!(own_cpu_seconds(std::process::id()).unwrap() > 0.0);
        assert!(resident_kib(std::process::id()).unwrap().0 > 100.0);
        assert!(cpu_seconds(u32::MAX).is_none());
    }
}
