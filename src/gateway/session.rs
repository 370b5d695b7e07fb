//! The life of one socket. Everything that is under way lives in [`Session`], so a branch of the `select!` that loses
//! loses nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::debug;
use tungstenite::protocol::Message;

use crate::app::App;
use crate::bus::{Signal, SignalSubscription, Signals};
use crate::gateway::acks::Acks;
use crate::gateway::end::End;
use crate::gateway::features::{DeviceList, Features};
use crate::gateway::inflight::Inflight;
use crate::gateway::inflow::{self, Inflow};
use crate::gateway::look::{NoFrame, Retry, timely};
use crate::gateway::memory::FrameMemory;
use crate::gateway::pace::Pace;
use crate::gateway::pings::next_ping;
use crate::gateway::pipe::{Event, LATE, Pipe};
use crate::gateway::progress::Progress;
use crate::gateway::socket::Connection;
use crate::gateway::trace_links::TraceLinks;
use crate::limits::Payer;
use crate::model::ids::{Address, DeviceNo, MessageId, Position};
use crate::store::{Notice, SessionHolder};
use crate::tasks::jittered;
use crate::telemetry::metrics::{Closed, Direction};
use crate::wire;

/// Serves one socket from its handshake to its end. The memory of large frames is charged to `payer`.
pub async fn run(
    app: App,
    (holder, payer): (SessionHolder, Payer),
    features: Features,
    connection: Box<dyn Connection>,
    progress: Arc<Progress>,
) {
    // Subscribed before the first read: what is queued from here on is either read or signalled.
    let subscription = app.bus.subscribe(Address { user: holder.user, device: holder.no });
    let _open = app.metrics.sockets.hold(());
    app.metrics.sockets_opened.increment(());
    let pipe = Pipe::new(connection, progress, app.config.gateway.longest_silence());
    let mut session = Session::new(app, &holder, payer, pipe);
    session.notice_wanted = features.inbox_notice;
    session.device_list = features.device_list.then(|| Box::new(DeviceList::new(holder.user)));
    let end = session.serve(&subscription).await;
    drop(subscription);
    let Session { app, device, pipe, acks, memory, .. } = session;
    app.metrics.sockets_closed.increment(end.reason(&pipe));
    // Acks that have arrived count, whatever became of the socket.
    tokio::join!(end.close(pipe, memory), Box::pin(acks.finish(&app, device)));
    app.push.session_ended(device);
}

struct Session {
    app: App,
    device: DeviceNo,
    /// The device's `tokens_revoked_until` at the handshake. It changes when the device is logged out.
    epoch: i64,
    pipe: Pipe,
    inflight: Inflight,
    acks: Acks,
    trace_links: TraceLinks,
    /// The inbox has been sent up to here.
    sent_to: Position,
    memory: FrameMemory,
    messages_wanted: bool,
    status_wanted: bool,
    auth_check_wanted: bool,
    notice_wanted: bool,
    /// `None` when the client did not ask for it.
    device_list: Option<Box<DeviceList>>,
    /// The notice that was sent on this socket and is not acknowledged, with its id.
    notice: Option<Box<(MessageId, Notice)>>,
    /// Set while prekey signals are being gathered.
    status_due: Option<Instant>,
    retry: Option<Retry>,
    ping_due: Instant,
    look_due: Instant,
    last_heard: Instant,
    inflow: Inflow,
    /// When to look next whether the frame under way makes progress.
    moving_due: Instant,
    pace: Pace,
}

impl Session {
    fn new(app: App, holder: &SessionHolder, payer: Payer, pipe: Pipe) -> Self {
        let now = Instant::now();
        let config = &app.config.gateway;
        let inflight = Inflight::new(app.config.messaging.max_inbox_size);
        let memory = FrameMemory::new(app.limits.frames.clone(), payer);
        Self {
            device: holder.no,
            epoch: holder.tokens_revoked_until,
            pipe,
            inflight,
            acks: Acks::default(),
            trace_links: TraceLinks::default(),
            sent_to: Position::default(),
            memory,
            messages_wanted: true,
            status_wanted: true,
            // The device may have been removed between the redeemed ticket and our subscription.
            auth_check_wanted: true,
            notice_wanted: false,
            device_list: None,
            notice: None,
            status_due: None,
            retry: None,
            ping_due: next_ping(now, app.clock.now(), config.ping_interval),
            look_due: now + jittered(config.look_interval),
            last_heard: now,
            inflow: Inflow::new(now),
            moving_due: now,
            pace: Pace::new(now),
            app,
        }
    }

    async fn serve(&mut self, subscription: &SignalSubscription) -> End {
        let tasks = self.app.tasks.clone();
        // One for the whole session: each would enter a list that all sessions share.
        let stopping = tasks.stopping();
        tokio::pin!(stopping);
        let timer = tokio::time::sleep_until(self.last_heard);
        tokio::pin!(timer);
        loop {
            self.start_what_is_due();
            // Boxed, so that an idle session doesn't keep room for what a busy one needs.
            if self.has_to_look()
                && let Err(end) = Box::pin(self.look_and_start()).await
            {
                return end;
            }
            let due = self.next_due();
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            let reading = self.is_reading();
            tokio::select! {
                biased;
                () = &mut stopping => return End::Stopping,
                signals = subscription.next() => if let Some(end) = self.signalled(signals, subscription) { return end },
                stored = self.acks.stored() => self.acks.settle(stored),
                () = self.memory.granted() => {}
                event = self.pipe.next(reading) => match event {
                    Event::Binary(frame) => self.heard(frame),
                    Event::Alive => self.heard_of(1),
                    Event::Unframed(bytes) => self.heard_of(bytes / inflow::BYTES),
                    Event::Large(is_large) => if !self.memory.incoming(is_large) { return End::NoMemory },
                    Event::Written => {
                        self.memory.written();
                        self.trace_links.written();
                        self.pace.was_taken(self.pipe.taken(), self.app.config.gateway.max_batch_bytes);
                    }
                    Event::Closed => return End::Gone,
                    Event::Offended(code) => return End::Offended(code),
                },
                () = &mut timer => if let Some(end) = self.tick(due) { return end },
            }
        }
    }

    /// Starts what takes no look at the database first: the next acks to be written, and a ping.
    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        if self.acks.are_due(now, &self.app.config.gateway) {
            self.acks.store(&self.app, self.device);
        }
        if self.ping_due <= now && !self.pipe.is_writing() {
            self.ping_due = next_ping(now, self.app.clock.now(), self.app.config.gateway.ping_interval);
            self.app.metrics.pings.increment(());
            self.start(Message::Ping(Bytes::new()));
        }
    }

    /// True when something has been asked to be looked at that can be looked at now.
    fn has_to_look(&self) -> bool {
        match self.retry {
            Some(retry) => retry.due <= Instant::now(),
            None => {
                self.auth_check_wanted
                    || (!self.pipe.is_writing()
                        && (self.status_wanted
                            || self.notice_wanted
                            || self.may_read_mail()
                            || self.device_list.as_ref().is_some_and(|list| list.is_wanted)))
            }
        }
    }

    /// Looks, and starts the frame that comes of it.
    async fn look_and_start(&mut self) -> std::result::Result<(), End> {
        match self.look().await {
            Ok(Some(frame)) => {
                self.retry = None;
                self.start(frame);
            }
            Ok(None) => self.retry = None,
            Err(NoFrame::Dismissed) => return Err(End::Dismissed(Closed::Dismissed)),
            Err(NoFrame::Failed) => {
                self.memory.cancel();
                self.retry = Some(Retry::after(self.retry, self.app.config.gateway.fetch_retry_budget));
            }
        }
        Ok(())
    }

    fn start(&mut self, frame: Message) {
        let now = Instant::now();
        self.moving_due = now + self.moving_step();
        if let Message::Binary(bytes) = &frame {
            self.pace.starts(bytes.len(), now);
            self.app.metrics.frames.increment(Direction::Out);
            self.app.metrics.frame_bytes.add(Direction::Out, bytes.len() as u64);
        }
        self.pipe.start(frame);
    }

    /// Looks at what has been asked to be looked at, until there is something to send.
    async fn look(&mut self) -> std::result::Result<Option<Message>, NoFrame> {
        if self.auth_check_wanted {
            let epoch = timely(self.app.store.epoch(self.device)).await?;
            // Zero is a second that lay more than a day back and was cleared: an end of this session was seen before that.
            if epoch.is_none_or(|epoch| epoch != 0 && epoch != self.epoch) {
                return Err(NoFrame::Dismissed);
            }
            self.auth_check_wanted = false;
            if let Some(list) = &mut self.device_list {
                list.is_wanted = true;
            }
        }
        if self.pipe.is_writing() {
            return Ok(None);
        }
        if self.status_wanted {
            let counts = timely(self.app.store.prekey_counts(self.device)).await?;
            self.status_wanted = false;
            let threshold = self.app.config.prekeys.refill_threshold;
            if let Some(counts) = counts
                && counts.is_below(threshold)
            {
                return Ok(Some(Message::Binary(wire::prekey_status(counts.ec, counts.pq, threshold))));
            }
        }
        if self.notice_wanted {
            let notice = timely(self.app.store.notice(self.device)).await?;
            self.notice_wanted = false;
            if let Some(notice) = notice {
                return Ok(Some(self.tell(notice)));
            }
        }
        if let Some(list) = self.device_list.as_mut().filter(|list| list.is_wanted)
            && let Some(frame) = list.look(&self.app.store).await?
        {
            return Ok(Some(Message::Binary(frame)));
        }
        if self.may_read_mail() { self.next_batch().await } else { Ok(None) }
    }

    /// The frame that says how many messages expired or were refused.
    fn tell(&mut self, notice: Notice) -> Message {
        let id = MessageId::random();
        let (expired, refused) = (notice.expired.max(0).unsigned_abs(), notice.refused.max(0).unsigned_abs());
        self.notice = Some(Box::new((id, notice)));
        Message::Binary(wire::inbox_notice(id, notice.since, expired, refused))
    }

    async fn next_batch(&mut self) -> std::result::Result<Option<Message>, NoFrame> {
        let limit = self.app.config.messaging.batch_limit;
        let most = self.app.config.gateway.max_batch_bytes.min(self.pace.frame_limit());
        let now = self.app.clock.earliest();
        let page = loop {
            let max_bytes = self.memory.reserve(most);
            let page = timely(self.app.store.unsent(self.device, self.sent_to, now, limit, max_bytes)).await?;
            match page.oversized {
                None => break page,
                // It is read with the memory for it. Each time the first message is larger, so this ends.
                Some(bytes) if self.memory.reserve_for_message(bytes) => {}
                Some(_) => return Ok(None),
            }
        };
        self.messages_wanted = page.more;
        self.memory.keep(page.envelopes.iter().map(|envelope| envelope.body.0.len()).sum());
        self.trace_links.read(&page.envelopes);
        let Some(last) = page.envelopes.last() else { return Ok(None) };
        self.sent_to = last.position;
        self.app.metrics.deliveries.add((), page.envelopes.len() as u64);
        page.envelopes.iter().for_each(|envelope| self.inflight.sent(envelope.id, envelope.position));
        Ok(Some(Message::Binary(wire::envelope_batch(page.envelopes))))
    }

    /// True when there may be mail, and no message waits for memory.
    fn may_read_mail(&self) -> bool {
        self.messages_wanted && !self.memory.is_waiting()
    }

    fn signalled(&mut self, signals: Signals, subscription: &SignalSubscription) -> Option<End> {
        if self.app.traces.are_recorded() {
            self.trace_links.signalled(&self.app.traces, subscription.take_trace_links());
        }
        self.messages_wanted |= signals.contains(Signal::NewMessages);
        self.auth_check_wanted |= signals.contains(Signal::AuthChanged);
        if signals.contains(Signal::KeysLow) && self.status_due.is_none() {
            self.status_due = Some(Instant::now() + self.app.config.gateway.prekey_debounce);
        }
        signals.contains(Signal::Superseded).then_some(End::Dismissed(Closed::Superseded))
    }

    /// The client has sent something that costs this many tokens.
    fn heard_of(&mut self, tokens: u32) {
        self.last_heard = Instant::now();
        self.inflow.charge(tokens, self.last_heard);
    }

    fn heard(&mut self, frame: Bytes) {
        self.last_heard = Instant::now();
        self.app.metrics.frames.increment(Direction::In);
        self.app.metrics.frame_bytes.add(Direction::In, frame.len() as u64);
        let due = self.last_heard + self.app.config.gateway.ack_flush_interval;
        let (mut known, mut unknown) = (0, 0);
        for id in wire::acknowledged(frame) {
            if let Some(told) = self.notice.take_if(|told| told.0 == id) {
                self.acks.tell(told.1, due);
                continue;
            }
            let position = self.inflight.take(id);
            *if position.is_some() { &mut known } else { &mut unknown } += 1;
            if let Some(position) = position {
                self.acks.trace(self.trace_links.acknowledged(&self.app.traces, position));
            }
            self.acks.add(id, position, due);
        }
        // Each unknown id is looked up in the database, and a frame without a known one is of no use.
        self.inflow.charge(if known > 0 { unknown } else { unknown + 1 }, self.last_heard);
    }

    /// What has become due with time. It was due at `due`.
    fn tick(&mut self, due: Instant) -> Option<End> {
        let now = Instant::now();
        if now.duration_since(due) > LATE {
            // The server was paused. What the client sent meanwhile still waits to be read, and no ping went out.
            let asked_now = now.checked_sub(self.app.config.gateway.ping_interval).unwrap_or(now);
            self.last_heard = self.last_heard.max(asked_now);
            self.ping_due = now;
        }
        if self.pipe.is_writing() && self.moving_due <= now {
            self.moving_due = now + self.moving_step();
            if self.pace.takes(self.pipe.taken(), now) {
                // Bytes of a long frame are being taken, so somebody is there.
                self.last_heard = now;
            }
        }
        if self.inflow.open(now) || !self.is_reading() {
            // We don't listen at the moment, so silence says nothing.
            self.last_heard = now;
        }
        let config = &self.app.config.gateway;
        if now >= self.silent_at() {
            debug!("a silent client is being disconnected");
            return Some(End::Silent);
        }
        if self.look_due <= now {
            self.look_due = now + jittered(config.look_interval);
            (self.messages_wanted, self.auth_check_wanted) = (true, true);
        }
        if self.status_due.is_some_and(|due| due <= now) {
            (self.status_due, self.status_wanted) = (None, true);
        }
        None
    }

    fn is_reading(&self) -> bool {
        self.inflow.is_open() && !self.acks.are_full(&self.app.config.gateway)
    }

    /// When a client that says nothing from now on is given up.
    fn silent_at(&self) -> Instant {
        let config = &self.app.config.gateway;
        (self.last_heard + config.ping_interval).max(self.pace.reading_until()) + config.ping_timeout
    }

    /// How often a frame under way is looked at.
    fn moving_step(&self) -> Duration {
        self.app.config.gateway.longest_silence() / 4
    }

    fn next_due(&self) -> Instant {
        let writing = if self.pipe.is_writing() { self.moving_due } else { self.ping_due };
        let waits = [self.status_due, self.retry.map(|retry| retry.due), self.acks.due(), self.inflow.due()];
        let due = self.look_due.min(self.silent_at()).min(writing);
        waits.into_iter().flatten().fold(due, Instant::min)
    }
}
