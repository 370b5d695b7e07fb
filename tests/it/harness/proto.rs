//! The messages of the contract, written down by hand: a number that changes in `proto/` fails the tests.

use bytes::Bytes;

#[derive(Clone, PartialEq, prost::Message)]
pub struct SendMessageRequest {
    #[prost(message, repeated, tag = "1")]
    pub recipients: Vec<Recipient>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Recipient {
    #[prost(bytes = "bytes", tag = "1")]
    pub user_id: Bytes,
    #[prost(message, repeated, tag = "2")]
    pub submissions: Vec<Submission>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Submission {
    #[prost(bytes = "bytes", tag = "1")]
    pub device_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub message: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SendMessageResponse {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub invalid_device_ids: Vec<Bytes>,
    #[prost(message, repeated, tag = "2")]
    pub device_mismatches: Vec<DeviceMismatch>,
    #[prost(message, repeated, tag = "3")]
    pub refused_devices: Vec<RefusedDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RefusedDevice {
    #[prost(bytes = "bytes", tag = "1")]
    pub device_id: Bytes,
    #[prost(int32, tag = "2")]
    pub reason: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct InboxNotice {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(uint64, tag = "2")]
    pub since: u64,
    #[prost(uint64, tag = "3")]
    pub expired_count: u64,
    #[prost(uint64, tag = "4")]
    pub refused_count: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceList {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub device_ids: Vec<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceMismatch {
    #[prost(bytes = "bytes", tag = "1")]
    pub user_id: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub missing_device_ids: Vec<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WebSocketFrame {
    #[prost(oneof = "Payload", tags = "11, 12, 13, 14, 15")]
    pub payload: Option<Payload>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    #[prost(message, tag = "11")]
    Ack(AckMessage),
    #[prost(message, tag = "12")]
    PreKeyStatus(PreKeyStatus),
    #[prost(message, tag = "13")]
    EnvelopeBatch(EnvelopeBatch),
    #[prost(message, tag = "14")]
    InboxNotice(InboxNotice),
    #[prost(message, tag = "15")]
    DeviceList(DeviceList),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AckMessage {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub message_ids: Vec<Bytes>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PreKeyStatus {
    #[prost(int32, tag = "1")]
    pub one_time_pre_key_count: i32,
    #[prost(int32, tag = "2")]
    pub min_threshold: i32,
    #[prost(int32, tag = "3")]
    pub pq_pre_key_count: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EnvelopeBatch {
    #[prost(message, repeated, tag = "1")]
    pub envelopes: Vec<Envelope>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    #[prost(bytes = "bytes", tag = "1")]
    pub id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub sender_user_id: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub sender_device_id: Bytes,
    #[prost(uint64, tag = "4")]
    pub timestamp: u64,
    #[prost(bytes = "bytes", tag = "5")]
    pub message: Bytes,
}
