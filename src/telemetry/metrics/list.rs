//! The list of all metrics. `docs/METRICS.md` is made from it.

use std::time::Duration;

use opentelemetry::metrics::Meter;

use crate::telemetry::metrics::instruments::{
    ActiveGauge, Build, Counter, Gauge, Histogram, Instrument, Kind, Name, Requests, TimeCounter,
};
use crate::telemetry::metrics::labels::*;
use crate::telemetry::metrics::process::Used;

/// A metric as the catalogue shows it.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Which part of the server it is about.
    pub area: &'static str,
    /// What it is called, and what it says.
    pub name: Name,
    /// What it measures.
    pub kind: Kind,
    /// Its labels, each with all its values.
    pub labels: Vec<Label>,
    /// More series than these there can't be.
    pub series: usize,
}

impl Definition {
    /// What it is called on the page for Prometheus.
    pub fn prometheus(&self) -> String {
        let unit = match self.name.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            _ => "",
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name.name.replace('.', "_"))
    }
}

/// Makes the instruments and their catalogue from one list, so that they can't differ.
macro_rules! metrics {
    ($($area:literal { $($field:ident: $kind:ty = $name:literal $unit:literal $meaning:literal,)* })*) => {
        /// Every instrument of a server.
        #[derive(Clone, Debug)]
        pub struct Instruments {
            $($(#[doc = $meaning] pub $field: $kind,)*)*
        }

        impl Instruments {
            pub(super) fn make(meter: &Meter) -> Self {
                Self {
                    $($($field: Instrument::make(meter, Name { name: $name, unit: $unit, meaning: $meaning }),)*)*
                }
            }
        }

        /// Every metric, in the order of the list.
        pub fn catalogue() -> Vec<Definition> {
            vec![$($(Definition {
                area: $area,
                name: Name { name: $name, unit: $unit, meaning: $meaning },
                kind: <$kind as Instrument>::KIND,
                labels: <$kind as Instrument>::labels(),
                series: <$kind as Instrument>::SERIES,
            },)*)*]
        }
    };
}

metrics! {
    "Requests" {
        requests: Requests = "http.server.request.duration" "s"
            "Time from a request's head to its answer's head, by route. Its count is the number of requests.",
        requests_active: ActiveGauge = "http.server.active_requests" "{request}"
            "Requests without an answer yet.",
        refusals: Counter<Refusal> = "obscura.http.errors" "{request}"
            "Requests that were refused or failed, by reason.",
        connections: ActiveGauge<Port> = "obscura.listener.connections" "{connection}"
            "Open connections, sockets of the gateway included.",
        connections_accepted: Counter<Port> = "obscura.listener.accepted" "{connection}"
            "Connections let in.",
        connections_turned_away: Counter<Port> = "obscura.listener.turned_away" "{connection}"
            "Connections closed at once, because there were too many, in all or from one address.",
        password_hashes: ActiveGauge = "obscura.passwords.active" "{hash}"
            "Passwords that are being hashed, or wait for a processor.",
        password_hashes_done: Counter = "obscura.passwords.hashes" "{hash}"
            "Passwords hashed or checked.",
        passwords_wrong: Counter = "obscura.passwords.wrong" "{password}"
            "Passwords that were wrong, whether or not the account exists.",
        passwords_refused: Counter = "obscura.passwords.refused" "{hash}"
            "Passwords turned away, because too many waited.",
    }
    "Gateway" {
        sockets: ActiveGauge = "obscura.gateway.sockets" "{socket}"
            "Open gateway sockets.",
        sockets_opened: Counter = "obscura.gateway.opened" "{socket}"
            "Gateway sockets opened.",
        sockets_closed: Counter<Closed> = "obscura.gateway.closed" "{socket}"
            "Gateway sockets ended, by reason. `silent` are lost pings, `slow` slow readers.",
        frames: Counter<Direction> = "obscura.gateway.frames" "{frame}"
            "Binary frames on gateway sockets.",
        frame_bytes: Counter<Direction> = "obscura.gateway.io" "By"
            "Bytes in these frames.",
        pings: Counter = "obscura.gateway.pings" "{ping}"
            "Pings sent to idle clients.",
        deliveries: Counter = "obscura.gateway.deliveries" "{message}"
            "Messages sent out on a socket; one that comes to several sockets, or comes again, counts each time.",
    }
    "Queue" {
        accepted: Counter = "obscura.queue.accepted" "{message}"
            "Messages queued for a device, durably.",
        accepted_bytes: Counter = "obscura.queue.accepted.size" "By"
            "Bytes of these messages.",
        left: Counter<Left> = "obscura.queue.left" "{message}"
            "Messages that left the queue for good, by cause.",
        refused_messages: Counter<QueueRefusal> = "obscura.queue.refused" "{message}"
            "Messages not queued for lack of room, by reason; a repeat that finds no room counts again.",
        counted: Counter = "obscura.queue.counted" "{message}"
            "Waiting messages that were counted to find out whether their inboxes have room.",
        repeats: Counter<Repeat> = "obscura.queue.repeats" "{send}"
            "Sends that had been sent before, and were answered with the first outcome.",
    }
    "Groups and database" {
        group_time: Histogram = "obscura.store.group.duration" "s"
            "Time to store a group of sends and acks, until it is on disk.",
        group_size: Histogram<Content> = "obscura.store.group.size" "{item}"
            "Sends, and acknowledged messages, in one group.",
        sends_left: Counter = "obscura.store.group.left" "{send}"
            "Sends left for a later group, because another node holds one of their accounts, or too many inboxes had to be counted.",
        group_retries: Counter = "obscura.store.group.retries" "{attempt}"
            "Groups begun anew, because they met another one.",
        group_failures: Counter<GroupFailure> = "obscura.store.group.failures" "{group}"
            "Groups that could not be stored; nothing of them was, as far as the server knows.",
        pool: Gauge<(PoolName, Use)> = "obscura.database.connections" "{connection}"
            "Connections to the database.",
        pool_waits: Counter<PoolName> = "obscura.database.waits" "{wait}"
            "Times somebody had to wait, because all connections were lent.",
        pool_time: Histogram<PoolName> = "obscura.database.acquire.duration" "s"
            "Time until a connection was there; a transaction of SQLite's writer included the wait for its turn.",
        pool_failures: Counter<PoolName> = "obscura.database.acquire.failures" "{wait}"
            "Times no connection could be had.",
        database_size: Gauge = "obscura.database.size" "By"
            "What the database takes on its disk, as `--db-max-size-bytes` counts it. Looked at once a minute.",
        sqlite_file: Gauge = "obscura.database.file.size" "By"
            "SQLite: the file of the database.",
        sqlite_wal: Gauge = "obscura.database.wal.size" "By"
            "SQLite: its write-ahead log.",
    }
    "Signals between nodes" {
        bus_connected: Gauge = "obscura.bus.connected" "{connection}"
            "1 while signals go to other nodes and come from them, or there are none to reach; 0 during an outage.",
        signals: Counter<SignalWay> = "obscura.bus.signals" "{signal}"
            "Signals to devices, by way.",
        bus_connects: Counter = "obscura.bus.connects" "{connection}"
            "Connections made to Valkey; all but the first are reconnects.",
        bus_resyncs: Counter = "obscura.bus.looks" "{look}"
            "Times every session of this node was told to look at everything.",
    }
    "Attachments" {
        blob_bytes: Counter<Direction> = "obscura.blobs.io" "By"
            "Bytes of attachments stored, and sent out.",
        blob_failures: Counter<BlobOperation> = "obscura.blobs.failures" "{operation}"
            "What the storage of attachments failed to do. Attachments that stay in a sweep count once in each round.",
    }
    "Push" {
        pushes: Counter<(PushProvider, PushOutcome)> = "obscura.push.attempts" "{push}"
            "Pushes tried, by what came of them.",
        push_refusals: Counter<(PushProvider, PushStatus)> = "obscura.push.refusals" "{push}"
            "Single pushes that were refused, by the status of the answer; also a 404 of Web Push.",
        push_time: Histogram<PushProvider> = "obscura.push.duration" "s"
            "Time a provider took to answer.",
        push_queue: Gauge = "obscura.push.queue.length" "{device}"
            "Devices in the push queue. With Valkey all nodes share it and see the same.",
        push_queue_connected: Gauge = "obscura.push.queue.connected" "{connection}"
            "1 while the push queue and the inboxes can be read, 0 while pushes wait until they are back.",
        dead_tokens: Counter = "obscura.push.dead_tokens" "{token}"
            "Tokens deleted, because their provider said that they will never work again.",
    }
    "Jobs and room" {
        job_runs: Counter<(Job, Ended)> = "obscura.job.runs" "{run}"
            "Rounds of repeated jobs. A round that has more to do goes on at once, and counts again.",
        job_success: Gauge<Job> = "obscura.job.last_success" "s"
            "When the job last ended well on this node, as Unix time. Not there before the first time.",
        accounts_expired: Counter = "obscura.accounts.expired" "{account}"
            "Accounts removed because they were not used: see `--account-idle-days` and `--account-unused-days`.",
        tasks_died: Counter = "obscura.tasks.died" "{task}"
            "Background tasks that ended too early, a defect; the server stops after the first.",
        clock_ahead: Gauge = "obscura.clock.ahead" "s"
            "By how much the clock of the machine is ahead of the time that the server trusts; below 0 when it is behind. 0 while it is not in doubt.",
        disk_free: Gauge = "obscura.disk.free" "By"
            "What is free on the disk of the data folder. Not there without one, or with `--disk-reserve-bytes=0`.",
        disk_free_inodes: Gauge = "obscura.disk.free.inodes" "{inode}"
            "How many more files the disk of the data folder can have. Not there without a data folder, or if the file system has no fixed number.",
        room: Gauge = "obscura.disk.room" "{level}"
            "0 while there is room; 1 while attachments are refused for lack of it; 2 while messages are, too.",
    }
    "Inventory" {
        users: Gauge = "obscura.inventory.users" "{account}"
            "Accounts. Exact.",
        devices: Gauge = "obscura.inventory.devices" "{device}"
            "Devices. Exact.",
        queued: Gauge = "obscura.inventory.messages" "{message}"
            "Messages that wait in the inboxes. Exact.",
        queued_bytes: Gauge = "obscura.inventory.messages.size" "By"
            "Bytes of these messages: their number times the average of the 500 oldest and the 500 newest. An estimate.",
        oldest: Gauge = "obscura.inventory.messages.oldest" "s"
            "Age of the oldest queued message. Near `--ttl-days` for a device that never comes is normal.",
        attachments: Gauge = "obscura.inventory.attachments" "{attachment}"
            "Attachments, uploads under way included. Exact.",
        attachment_bytes: Gauge = "obscura.inventory.attachments.size" "By"
            "Bytes of these attachments. Exact.",
        push_tokens: Gauge = "obscura.inventory.push_tokens" "{token}"
            "Devices that can be woken. Exact.",
    }
    "Process" {
        build: Build = "obscura.build.info" ""
            "Always 1; the version is the label.",
        start_time: Gauge = "process.start_time" "s"
            "When the server started, as Unix time.",
        uptime: Gauge = "process.uptime" "s"
            "Since when it runs.",
        cpu: TimeCounter<Mode> = "process.cpu.time" "s"
            "Time on processors.",
        memory: Gauge = "process.memory.usage" "By"
            "Memory that is resident.",
        open_files: Gauge = "process.unix.file_descriptor.count" "{file_descriptor}"
            "Open files, connections included.",
        runtime_workers: Gauge = "obscura.runtime.workers" "{thread}"
            "Threads that run tasks.",
        runtime_tasks: Gauge = "obscura.runtime.tasks" "{task}"
            "Tasks that are alive: about one for each connection.",
        runtime_queue: Gauge = "obscura.runtime.queue" "{task}"
            "Tasks that wait in the common queue for a thread.",
    }
}

/// What several instruments are told at once.
impl Instruments {
    /// A round of a repeated job is over, at this Unix second.
    pub fn job_ended(&self, job: Job, is_well: bool, now: i64) {
        self.job_runs.increment((job, if is_well { Ended::Done } else { Ended::Failed }));
        if is_well {
            self.job_success.set(job, now);
        }
    }

    /// What is told about the database that all nodes share.
    pub fn inventory(&self) -> [&Gauge; 9] {
        [
            &self.users,
            &self.devices,
            &self.queued,
            &self.queued_bytes,
            &self.oldest,
            &self.attachments,
            &self.attachment_bytes,
            &self.push_tokens,
            &self.database_size,
        ]
    }

    /// What the process is doing now, on a system that tells.
    pub fn process(&self, used: &Used) {
        let ticks = |ticks: u64| Duration::from_millis(ticks.saturating_mul(1000) / used.ticks_per_second.max(1));
        self.cpu.set(Mode::User, ticks(used.user_ticks));
        self.cpu.set(Mode::System, ticks(used.system_ticks));
        self.memory.set((), used.resident_bytes);
        self.open_files.set((), used.open_files);
    }
}
