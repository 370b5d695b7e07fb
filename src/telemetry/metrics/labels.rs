//! The labels of metrics. Each has a name and a fixed set of values, so nothing that a client sends can become one.

use opentelemetry::KeyValue;

/// What the series of an instrument are told apart by: nothing, one label, or two.
pub trait Labels: Copy {
    /// How many combinations of values there are.
    const COUNT: usize;
    /// The labels, each with all its values.
    fn all() -> Vec<Label>;
    /// Every combination of values, in the order of [`Labels::place`].
    fn combinations() -> Vec<Vec<KeyValue>>;
    /// Which combination this is.
    fn place(self) -> usize;
}

/// A label as the catalogue shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its name in OTLP.
    pub name: &'static str,
    /// Its values, each with what it means.
    pub values: &'static [(&'static str, &'static str)],
}

impl Labels for () {
    const COUNT: usize = 1;

    fn all() -> Vec<Label> {
        Vec::new()
    }

    fn combinations() -> Vec<Vec<KeyValue>> {
        vec![Vec::new()]
    }

    fn place(self) -> usize {
        0
    }
}

impl<A: Labels, B: Labels> Labels for (A, B) {
    const COUNT: usize = A::COUNT * B::COUNT;

    fn all() -> Vec<Label> {
        [A::all(), B::all()].concat()
    }

    fn combinations() -> Vec<Vec<KeyValue>> {
        let (first, second) = (A::combinations(), B::combinations());
        first.iter().flat_map(|one| second.iter().map(|other| [&one[..], &other[..]].concat())).collect()
    }

    fn place(self) -> usize {
        self.0.place() * B::COUNT + self.1.place()
    }
}

/// Makes an enum of a label's values.
macro_rules! label {
    ($(#[$about:meta])* $label:ident $name:literal { $($value:ident $text:literal $meaning:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $label {
            $(#[doc = concat!("`", $text, "`: ", $meaning)] $value,)*
        }

        impl $label {
            const VALUES: &'static [(&'static str, &'static str)] = &[$(($text, $meaning)),*];

            /// The value as it is shown.
            pub const fn text(self) -> &'static str {
                Self::VALUES[self as usize].0
            }
        }

        impl Labels for $label {
            const COUNT: usize = Self::VALUES.len();

            fn all() -> Vec<Label> {
                vec![Label { name: $name, values: Self::VALUES }]
            }

            fn combinations() -> Vec<Vec<KeyValue>> {
                Self::VALUES.iter().map(|(value, _)| vec![KeyValue::new($name, *value)]).collect()
            }

            fn place(self) -> usize {
                self as usize
            }
        }
    };
}

label! {
    /// A request's method.
    Method "http.request.method" {
        Get "GET" "",
        Head "HEAD" "",
        Post "POST" "",
        Put "PUT" "",
        Delete "DELETE" "",
        Other "_OTHER" "any other; no route takes one",
    }
}

label! {
    /// The first digit of an answer's status.
    Class "http.response.status_class" {
        Informational "1xx" "the socket was opened (101)",
        Success "2xx" "it was done",
        Redirection "3xx" "the client has it already (304)",
        ClientError "4xx" "refused; see `obscura.http.errors`",
        ServerError "5xx" "failed, or no room; see `obscura.http.errors`",
    }
}

label! {
    /// Why a request was refused, or failed.
    Refusal "error.type" {
        BadRequest "bad_request" "400: not what the endpoint takes",
        Unauthorized "unauthorized" "401: no valid token, ticket or password",
        Forbidden "forbidden" "403: not allowed to this device",
        NotFound "not_found" "404: no such thing, or no such route",
        MethodNotAllowed "method_not_allowed" "405: no such method here",
        Timeout "timeout" "408: no answer within `--server-request-timeout-secs` or the like",
        Conflict "conflict" "409: taken, or in the way of something else",
        LengthRequired "length_required" "411: an upload without a length",
        TooLarge "too_large" "413: too large a body, or an account's quota",
        UnsupportedMediaType "unsupported_media_type" "415: not JSON, or a `content-encoding`",
        RangeNotSatisfiable "range_not_satisfiable" "416: no such part of an attachment",
        Unprocessable "unprocessable" "422: JSON of the wrong shape",
        UpgradeRequired "upgrade_required" "426: not a WebSocket handshake",
        AddressLimit "limit_address" "429: too many requests from an address",
        AddressAuthLimit "limit_address_auth" "429: too many log-ins and the like from an address",
        AccountLimit "limit_account" "429: too many requests, or too many uploads of keys, of an account",
        InboxRoom "inbox_room" "429: no room for a message of the send; the others are queued",
        TargetLimit "limit_target" "429: too much sent to one account",
        BundleLimit "limit_bundles" "429: one account looked at another's prekeys too often",
        SignUpLimit "limit_sign_ups" "429: too many sign-ups, from an address, a network or in all",
        PasswordLimit "limit_passwords" "429: too many wrong passwords for one account",
        UploadRate "limit_uploads" "429: too many uploads were begun, by an account, an address, a network or in all",
        UploadLimit "limit_upload_bytes" "429: an account's bytes of attachments for a day are used up",
        Internal "internal" "500: a defect of ours; the log has its cause",
        Database "database" "503: the database failed or took too long",
        MessageWriter "mailroom" "503: a group could not be stored, or a send was left for too long",
        Storage "storage" "503: the storage of attachments failed",
        Passwords "passwords" "503: too many passwords wait to be hashed",
        Signatures "signatures" "503: too many uploads of keys wait to be checked",
        Memory "memory" "503: no memory for a body, or for a part of an upload",
        NoRoom "no_room" "507: the disk or the database is full, or nearly",
        Abandoned "abandoned" "no answer: the client hung up before there was one",
    }
}

label! {
    /// Which port.
    Port "port" {
        Api "api" "what clients use",
        Management "management" "health and metrics",
    }
}

label! {
    /// Which way bytes or frames went, as the server sees it.
    Direction "network.io.direction" {
        In "receive" "to the server",
        Out "transmit" "from the server",
    }
}

label! {
    /// Why a gateway socket ended.
    Closed "reason" {
        Gone "gone" "the client closed it or broke the protocol, or the connection broke",
        NoMemory "no_memory" "there was no memory for a large message of the client",
        Silent "silent" "a ping was not answered in time",
        Slow "slow" "the client took no byte for `--ws-write-timeout-secs`",
        Dismissed "dismissed" "the device was removed or logged out",
        Superseded "superseded" "the device opened more sockets than it may have",
        Stopping "stopping" "the server stopped",
    }
}

label! {
    /// How a queued message left its inbox.
    Left "cause" {
        Acked "acked" "its device acknowledged it",
        Expired "expired" "it was past its age, and swept",
        Removed "removed" "its device or account was removed or reset",
    }
}

label! {
    /// Why a message was not queued.
    QueueRefusal "reason" {
        Inbox "inbox" "the inbox was full, in messages or bytes",
        Share "share" "the inbox was more than half full, and the sending account had its share of it",
        Day "day" "the sending account had queued as many bytes as it may in a day",
        Target "target" "the account written to gets too many sends at the moment",
    }
}

label! {
    /// How a repeated send compares with the first one.
    Repeat "body" {
        Same "same" "the same request again",
        Other "other" "another request under the same key: a fault of the client",
    }
}

label! {
    /// What is in a group.
    Content "content" {
        Sends "sends" "sends",
        Acks "acks" "acknowledged messages",
    }
}

label! {
    /// Why a group could not be stored.
    GroupFailure "reason" {
        Full "full" "there is no room on the database's disk",
        Unavailable "unavailable" "the database failed, refused or took too long",
    }
}

label! {
    /// Which connections to the database.
    PoolName "pool" {
        Reader "reader" "SQLite: those that read",
        Writer "writer" "SQLite: the one that writes",
        Shared "shared" "PostgreSQL: all of them",
    }
}

label! {
    /// What a connection is doing.
    Use "state" {
        Used "used" "lent to somebody",
        Idle "idle" "open and waiting",
    }
}

label! {
    /// What is done with the bytes of an attachment.
    BlobOperation "operation" {
        Upload "upload" "taking them in",
        Download "download" "reading them",
        Delete "delete" "removing them, by a sweep or after an upload that came to nothing",
    }
}

label! {
    /// A push provider.
    PushProvider "provider" {
        Fcm "fcm" "Firebase Cloud Messaging",
        Apns "apns" "the Apple Push Notification service",
        WebPush "webpush" "Web Push and UnifiedPush",
    }
}

label! {
    /// What came of a push.
    PushOutcome "outcome" {
        Accepted "accepted" "the provider has it",
        Logged "logged" "no provider is set up, so it was only logged",
        TokenGone "token_gone" "the token will never work again, and is deleted",
        Refused "refused" "this one was not taken; it is tried again",
        GivenUp "given_up" "refused so often that the device is left alone for now",
        Unavailable "unavailable" "the provider is away, busy or refuses our credentials; it is tried again",
    }
}

label! {
    /// With which status a push was refused.
    PushStatus "status" {
        BadRequest "400" "the provider doesn't understand or allow it",
        Unauthorized "401" "it doesn't accept our key",
        Forbidden "403" "it doesn't accept our key, or wants a contact",
        NotFound "404" "it doesn't know the subscription",
        TooLarge "413" "it is too large",
        TooMany "429" "there are too many",
        Failure "5xx" "the service has a problem of its own",
        Other "other" "any other",
    }
}

impl PushStatus {
    /// The label of an answer with this status.
    pub fn of(status: u16) -> Self {
        match status {
            400 => Self::BadRequest,
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            404 => Self::NotFound,
            413 => Self::TooLarge,
            429 => Self::TooMany,
            500..=599 => Self::Failure,
            _ => Self::Other,
        }
    }
}

label! {
    /// Where signals go to or come from.
    SignalWay "way" {
        Local "local" "told to sessions of this node by itself",
        Out "out" "handed to Valkey for other nodes",
        In "in" "come from other nodes",
    }
}

label! {
    /// A repeated job, by the name it has in the log.
    Job "job.name" {
        ExpiredMessages "expired messages" "deletes messages past their age",
        SendOutcomes "outcomes of sends" "forgets the outcomes that repeats were kept for",
        UnusedSpace "unused space" "gives free pages of SQLite's file back",
        ExpiredAttachments "expired attachments" "deletes attachments past their age",
        StaleUploads "stale uploads" "removes what broken-off uploads left",
        UploadDebts "uploads of the last day" "forgets paid-off uploads",
        ExpiredSessions "expired sessions" "forgets sessions whose refresh token is past its age",
        ExpiredTickets "expired tickets" "forgets gateway tickets",
        UsedRefreshTokens "used refresh tokens" "forgets refresh tokens used a while ago",
        PastSeconds "past seconds" "forgets when the last access tokens of a device expired",
        ExpiredLinks "expired link sessions" "forgets link sessions",
        AccountUse "use of accounts" "writes down which accounts were used today",
        UnusedAccounts "unused accounts" "removes accounts that are not used any more",
        Leftovers "leftovers" "forgets what is still kept for devices and accounts that are gone",
        Clock "clock" "compares the clock with the time that is remembered, and remembers it",
        Room "room to grow" "looks whether there is room to grow",
        Connections "database connections" "closes idle connections to the database",
        PushQueue "push queue" "looks in the inboxes for devices that should have been woken",
        Inventory "inventory" "counts what the database holds",
        Figures "figures" "reads what the process and the pools are doing",
    }
}

label! {
    /// How a run of a job ended.
    Ended "outcome" {
        Done "done" "well; also when another node had done it",
        Failed "failed" "with an error, which the log has; it is tried again",
    }
}

label! {
    /// Whose time on a processor.
    Mode "cpu.mode" {
        User "user" "the server's own code",
        System "system" "the kernel on its behalf",
    }
}
