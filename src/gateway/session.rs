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
use crate::gateway::database_read::{ReadError, Retry, with_timeout};
use crate::gateway::features::{DeviceList, Features};
use crate::gateway::frame_pacer::FramePacer;
use crate::gateway::frame_socket::{Event, FrameSocket, SUSPENDED_AFTER};
use crate::gateway::inflight::Inflight;
use crate::gateway::memory::FrameMemory;
use crate::gateway::pings::next_ping;
use crate::gateway::progress::ConnectionProgress;
use crate::gateway::read_limiter::{self, ReadLimiter};
use crate::gateway::session_end::SessionEnd;
use crate::gateway::socket::Connection;
use crate::gateway::trace_links::TraceLinks;
use crate::limits::LimitSubject;
use crate::model::ids::{Address, DeviceNo, MessageId, Position};
use crate::store::{Notice, SessionHolder};
use crate::tasks::jittered;
use crate::telemetry::metrics::{Closed, Direction};
use crate::wire;

/// Serves one socket from its handshake to its end. The memory of large frames is charged to `subject`.
pub async fn run(
    app: App,
    (holder, subject): (SessionHolder, LimitSubject),
    features: Features,
    connection: Box<dyn Connection>,
    progress: Arc<ConnectionProgress>,
) {
    // Subscribed before the first read: what is queued from here on is either read or signalled.
    let subscription = app.bus.subscribe(Address { user: holder.user, device: holder.no });
    let _open = app.metrics.sockets.hold(());
    app.metrics.sockets_opened.increment(());
    let frame_socket = FrameSocket::new(connection, progress, app.config.gateway.longest_silence());
    let mut session = Session::new(app, &holder, subject, frame_socket);
    session.notice_wanted = features.inbox_notice;
    session.device_list = features.device_list.then(|| Box::new(DeviceList::new(holder.user)));
    let end = session.serve(&subscription).await;
    drop(subscription);
    let Session { app, device, frame_socket, acks, memory, .. } = session;
    app.metrics.sockets_closed.increment(end.reason(&frame_socket));
    // Acks that have arrived count, whatever became of the socket.
    tokio::join!(end.close(frame_socket, memory), Box::pin(acks.finish(&app, device)));
    app.push.session_ended(device);
}

struct Session {
    app: App,
    device: DeviceNo,
    /// The device's `tokens_revoked_until` at the handshake. It changes when the device is logged out.
    epoch: i64,
    frame_socket: FrameSocket,
    inflight: Inflight,
    acks: Acks,
    trace_links: TraceLinks,
    /// The inbox has been sent up to here.
    cursor: Position,
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
    resync_due: Instant,
    last_heard: Instant,
    read_limiter: ReadLimiter,
    /// When to look next whether the frame under way makes progress.
    progress_check_due: Instant,
    pacer: FramePacer,
}

impl Session {
    fn new(app: App, holder: &SessionHolder, subject: LimitSubject, frame_socket: FrameSocket) -> Self {
        let now = Instant::now();
        let config = &app.config.gateway;
        let inflight = Inflight::new(app.config.messaging.max_inbox_size);
        let memory = FrameMemory::new(app.limits.frames.clone(), subject);
        Self {
            device: holder.no,
            epoch: holder.tokens_revoked_until,
            frame_socket,
            inflight,
            acks: Acks::default(),
            trace_links: TraceLinks::default(),
            cursor: Position::default(),
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
            resync_due: now + jittered(config.resync_interval),
            last_heard: now,
            read_limiter: ReadLimiter::new(now),
            progress_check_due: now,
            pacer: FramePacer::new(now),
            app,
        }
    }

    async fn serve(&mut self, subscription: &SignalSubscription) -> SessionEnd {
        let tasks = self.app.tasks.clone();
        // One for the whole session: each would enter a list that all sessions share.
        let stopping = tasks.stopping();
        tokio::pin!(stopping);
        let timer = tokio::time::sleep_until(self.last_heard);
        tokio::pin!(timer);
        loop {
            self.start_what_is_due();
            // Boxed, so that an idle session doesn't keep room for what a busy one needs.
            if self.needs_read()
                && let Err(end) = Box::pin(self.read_and_start_frame()).await
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
                () = &mut stopping => return SessionEnd::Stopping,
                signals = subscription.next() => if let Some(end) = self.on_signals(signals, subscription) { return end },
                stored = self.acks.stored() => self.acks.finish_write(stored),
                () = self.memory.granted() => {}
                event = self.frame_socket.next(reading) => match event {
                    Event::Binary(frame) => self.on_frame(frame),
                    Event::Alive => self.on_activity(1),
                    Event::PartialFrame(bytes) => self.on_activity(bytes / read_limiter::BYTES_PER_TOKEN),
                    Event::Large(is_large) => if !self.memory.incoming(is_large) { return SessionEnd::NoMemory },
                    Event::Written => {
                        self.memory.written();
                        self.trace_links.written();
                        self.pacer.frame_written(self.frame_socket.taken(), self.app.config.gateway.max_batch_bytes);
                    }
                    Event::Closed => return SessionEnd::Gone,
                    Event::ProtocolViolation(code) => return SessionEnd::ProtocolViolation(code),
                },
                () = &mut timer => if let Some(end) = self.on_timer(due) { return end },
            }
        }
    }

    /// Starts what takes no look at the database first: the next acks to be written, and a ping.
    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        if self.acks.are_due(now, &self.app.config.gateway) {
            self.acks.store(&self.app, self.device);
        }
        if self.ping_due <= now && !self.frame_socket.is_writing() {
            self.ping_due = next_ping(now, self.app.clock.now(), self.app.config.gateway.ping_interval);
            self.app.metrics.pings.increment(());
            self.start_frame(Message::Ping(Bytes::new()));
        }
    }

    /// True when something has been asked to be looked at that can be looked at now.
    fn needs_read(&self) -> bool {
        match self.retry {
            Some(retry) => retry.due <= Instant::now(),
            None => {
                self.auth_check_wanted
                    || (!self.frame_socket.is_writing()
                        && (self.status_wanted
                            || self.notice_wanted
                            || self.may_read_mail()
                            || self.device_list.as_ref().is_some_and(|list| list.is_wanted)))
            }
        }
    }

    /// Looks, and starts the frame that comes of it.
    async fn read_and_start_frame(&mut self) -> std::result::Result<(), SessionEnd> {
        match self.next_frame().await {
            Ok(Some(frame)) => {
                self.retry = None;
                self.start_frame(frame);
            }
            Ok(None) => self.retry = None,
            Err(ReadError::Dismissed) => return Err(SessionEnd::Dismissed(Closed::Dismissed)),
            Err(ReadError::Failed) => {
                self.memory.cancel();
                self.retry = Some(Retry::after(self.retry, self.app.config.gateway.fetch_retry_budget));
            }
        }
        Ok(())
    }

    fn start_frame(&mut self, frame: Message) {
        let now = Instant::now();
        self.progress_check_due = now + self.progress_check_interval();
        if let Message::Binary(bytes) = &frame {
            self.pacer.frame_started(bytes.len(), now);
            self.app.metrics.frames.increment(Direction::Out);
            self.app.metrics.frame_bytes.add(Direction::Out, bytes.len() as u64);
        }
        self.frame_socket.start(frame);
    }

    /// Looks at what has been asked to be looked at, until there is something to send.
    async fn next_frame(&mut self) -> std::result::Result<Option<Message>, ReadError> {
        if self.auth_check_wanted {
            let epoch = with_timeout(self.app.store.epoch(self.device)).await?;
            // Zero is a second that lay more than a day back and was cleared: an end of this session was seen before that.
            if epoch.is_none_or(|epoch| epoch != 0 && epoch != self.epoch) {
                return Err(ReadError::Dismissed);
            }
            self.auth_check_wanted = false;
            if let Some(list) = &mut self.device_list {
                list.is_wanted = true;
            }
        }
        if self.frame_socket.is_writing() {
            return Ok(None);
        }
        if self.status_wanted {
            let counts = with_timeout(self.app.store.prekey_counts(self.device)).await?;
            self.status_wanted = false;
            let threshold = self.app.config.prekeys.refill_threshold;
            if let Some(counts) = counts
                && counts.is_below(threshold)
            {
                return Ok(Some(Message::Binary(wire::prekey_status(counts.ec, counts.pq, threshold))));
            }
        }
        if self.notice_wanted {
            let notice = with_timeout(self.app.store.notice(self.device)).await?;
            self.notice_wanted = false;
            if let Some(notice) = notice {
                return Ok(Some(self.notice_frame(notice)));
            }
        }
        if let Some(list) = self.device_list.as_mut().filter(|list| list.is_wanted)
            && let Some(frame) = list.refresh(&self.app.store).await?
        {
            return Ok(Some(Message::Binary(frame)));
        }
        if self.may_read_mail() { self.next_batch().await } else { Ok(None) }
    }

    /// The frame that says how many messages expired or were refused.
    fn notice_frame(&mut self, notice: Notice) -> Message {
        let id = MessageId::random();
        let (expired, refused) = (notice.expired.max(0).unsigned_abs(), notice.refused.max(0).unsigned_abs());
        self.notice = Some(Box::new((id, notice)));
        Message::Binary(wire::inbox_notice(id, notice.since, expired, refused))
    }

    async fn next_batch(&mut self) -> std::result::Result<Option<Message>, ReadError> {
        let limit = self.app.config.messaging.batch_limit;
        let most = self.app.config.gateway.max_batch_bytes.min(self.pacer.frame_limit());
        let now = self.app.clock.earliest();
        let page = loop {
            let max_bytes = self.memory.reserve(most);
            let page = with_timeout(self.app.store.unsent(self.device, self.cursor, now, limit, max_bytes)).await?;
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
        self.cursor = last.position;
        self.app.metrics.deliveries.add((), page.envelopes.len() as u64);
        page.envelopes.iter().for_each(|envelope| self.inflight.sent(envelope.id, envelope.position));
        Ok(Some(Message::Binary(wire::envelope_batch(page.envelopes))))
    }

    /// True when there may be mail, and no message waits for memory.
    fn may_read_mail(&self) -> bool {
        self.messages_wanted && !self.memory.is_waiting()
    }

    fn on_signals(&mut self, signals: Signals, subscription: &SignalSubscription) -> Option<SessionEnd> {
        if self.app.traces.are_recorded() {
            self.trace_links.signalled(&self.app.traces, subscription.take_trace_links());
        }
        self.messages_wanted |= signals.contains(Signal::NewMessages);
        self.auth_check_wanted |= signals.contains(Signal::AuthChanged);
        if signals.contains(Signal::KeysLow) && self.status_due.is_none() {
            self.status_due = Some(Instant::now() + self.app.config.gateway.prekey_debounce);
        }
        signals.contains(Signal::Superseded).then_some(SessionEnd::Dismissed(Closed::Superseded))
    }

    /// The client has sent something that costs this many tokens.
    fn on_activity(&mut self, tokens: u32) {
        self.last_heard = Instant::now();
        self.read_limiter.charge(tokens, self.last_heard);
    }

    fn on_frame(&mut self, frame: Bytes) {
        self.last_heard = Instant::now();
        self.app.metrics.frames.increment(Direction::In);
        self.app.metrics.frame_bytes.add(Direction::In, frame.len() as u64);
        let due = self.last_heard + self.app.config.gateway.ack_flush_interval;
        let (mut known, mut unknown) = (0, 0);
        for id in wire::acknowledged(frame) {
            if let Some(sent_notice) = self.notice.take_if(|sent_notice| sent_notice.0 == id) {
                self.acks.add_notice(sent_notice.1, due);
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
        self.read_limiter.charge(if known > 0 { unknown } else { unknown + 1 }, self.last_heard);
    }

    /// What has become due with time. It was due at `due`.
    fn on_timer(&mut self, due: Instant) -> Option<SessionEnd> {
        let now = Instant::now();
        if now.duration_since(due) > SUSPENDED_AFTER {
            // The server was paused. What the client sent meanwhile still waits to be read, and no ping went out.
            let asked_now = now.checked_sub(self.app.config.gateway.ping_interval).unwrap_or(now);
            self.last_heard = self.last_heard.max(asked_now);
            self.ping_due = now;
        }
        if self.frame_socket.is_writing() && self.progress_check_due <= now {
            self.progress_check_due = now + self.progress_check_interval();
            if self.pacer.record_progress(self.frame_socket.taken(), now) {
                // Bytes of a long frame are being taken, so the client is there.
                self.last_heard = now;
            }
        }
        if self.read_limiter.reopen(now) || !self.is_reading() {
            // We don't listen at the moment, so silence says nothing.
            self.last_heard = now;
        }
        let config = &self.app.config.gateway;
        if now >= self.silent_at() {
            debug!("a silent client is being disconnected");
            return Some(SessionEnd::Silent);
        }
        if self.resync_due <= now {
            self.resync_due = now + jittered(config.resync_interval);
            (self.messages_wanted, self.auth_check_wanted) = (true, true);
        }
        if self.status_due.is_some_and(|due| due <= now) {
            (self.status_due, self.status_wanted) = (None, true);
        }
        None
    }

    fn is_reading(&self) -> bool {
        self.read_limiter.is_open() && !self.acks.are_full(&self.app.config.gateway)
    }

    /// When a client that says nothing from now on is given up.
    fn silent_at(&self) -> Instant {
        let config = &self.app.config.gateway;
        (self.last_heard + config.ping_interval).max(self.pacer.reading_until()) + config.ping_timeout
    }

    /// How often a frame under way is looked at.
    fn progress_check_interval(&self) -> Duration {
        self.app.config.gateway.longest_silence() / 4
    }

    fn next_due(&self) -> Instant {
        let writing = if self.frame_socket.is_writing() { self.progress_check_due } else { self.ping_due };
        let waits =
            [self.status_due, self.retry.map(|retry| retry.due), self.acks.due(), self.read_limiter.reopens_at()];
        let due = self.resync_due.min(self.silent_at()).min(writing);
        waits.into_iter().flatten().fold(due, Instant::min)
    }
}
