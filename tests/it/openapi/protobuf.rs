//! The protobuf half of the contract, `proto/obscura/v1/obscura.proto`: its numbers and types never change.

use std::collections::BTreeSet;

/// The contract as it was published, and after it our additions. Message, field, number, type.
const FIELDS: &[(&str, &str, i32, &str)] = &[
    ("SendMessageRequest", "recipients", 1, "repeated SendMessageRequest.Recipient"),
    ("SendMessageRequest.Recipient", "user_id", 1, "bytes"),
    ("SendMessageRequest.Recipient", "submissions", 2, "repeated SendMessageRequest.Submission"),
    ("SendMessageRequest.Submission", "device_id", 1, "bytes"),
    ("SendMessageRequest.Submission", "message", 2, "bytes"),
    ("SendMessageResponse", "invalid_device_ids", 1, "repeated bytes"),
    ("SendMessageResponse", "device_mismatches", 2, "repeated SendMessageResponse.DeviceMismatch"),
    ("SendMessageResponse.DeviceMismatch", "user_id", 1, "bytes"),
    ("SendMessageResponse.DeviceMismatch", "missing_device_ids", 2, "repeated bytes"),
    ("WebSocketFrame", "ack", 11, "payload AckMessage"),
    ("WebSocketFrame", "pre_key_status", 12, "payload PreKeyStatus"),
    ("WebSocketFrame", "envelope_batch", 13, "payload EnvelopeBatch"),
    ("AckMessage", "message_ids", 1, "repeated bytes"),
    ("PreKeyStatus", "one_time_pre_key_count", 1, "int32"),
    ("PreKeyStatus", "min_threshold", 2, "int32"),
    ("EnvelopeBatch", "envelopes", 1, "repeated Envelope"),
    ("Envelope", "id", 1, "bytes"),
    ("Envelope", "sender_user_id", 2, "bytes"),
    ("Envelope", "sender_device_id", 3, "bytes"),
    ("Envelope", "timestamp", 4, "uint64"),
    ("Envelope", "message", 5, "bytes"),
    ("PreKeyStatus", "pq_pre_key_count", 3, "int32"),
    // Ours, which clients of the contract pass over.
    ("SendMessageResponse", "refused_devices", 3, "repeated SendMessageResponse.RefusedDevice"),
    ("SendMessageResponse.RefusedDevice", "device_id", 1, "bytes"),
    ("SendMessageResponse.RefusedDevice", "reason", 2, "SendMessageResponse.Reason"),
    ("WebSocketFrame", "inbox_notice", 14, "payload InboxNotice"),
    ("InboxNotice", "id", 1, "bytes"),
    ("InboxNotice", "since", 2, "uint64"),
    ("InboxNotice", "expired_count", 3, "uint64"),
    ("InboxNotice", "refused_count", 4, "uint64"),
    ("WebSocketFrame", "device_list", 15, "payload DeviceList"),
    ("DeviceList", "device_ids", 1, "repeated bytes"),
];

/// A field as the table has it.
type Field = (String, String, i32, String);

#[test]
fn the_protobuf_contract_has_exactly_the_fields_of_section_13() {
    let root = env!("CARGO_MANIFEST_DIR");
    let set = protox::compile(["obscura/v1/obscura.proto"], [format!("{root}/proto")]).expect("a contract");
    let [file] = &set.file[..] else { panic!("one file") };
    assert_eq!((file.package(), file.syntax()), ("obscura.v1", "proto3"));

    let mut fields = BTreeSet::<Field>::new();
    // A message and its full name; nested ones are put behind it.
    let mut messages: Vec<_> = file.message_type.iter().map(|message| (message.name().to_owned(), message)).collect();
    while let Some((name, message)) = messages.pop() {
        messages.extend(message.nested_type.iter().map(|nested| (format!("{name}.{}", nested.name()), nested)));
        for field in &message.field {
            let of_type = match field.type_name() {
                "" => field.r#type().as_str_name().trim_start_matches("TYPE_").to_lowercase(),
                message => message.trim_start_matches(".obscura.v1.").to_owned(),
            };
            let oneof = field.oneof_index.map(|index| message.oneof_decl[index as usize].name().to_owned());
            let label = match (field.label().as_str_name(), oneof) {
                ("LABEL_REPEATED", None) => "repeated ".to_owned(),
                ("LABEL_OPTIONAL", oneof) => oneof.map(|oneof| oneof + " ").unwrap_or_default(),
                other => panic!("{}: {other:?}", field.name()),
            };
            fields.insert((name.clone(), field.name().to_owned(), field.number(), label + &of_type));
        }
    }
    let expected = FIELDS
        .iter()
        .map(|&(message, name, number, of_type)| (message.to_owned(), name.to_owned(), number, of_type.to_owned()));
    assert_eq!(fields, expected.collect());
}

#[test]
fn the_number_of_the_older_single_envelope_stays_reserved() {
    let root = env!("CARGO_MANIFEST_DIR");
    let set = protox::compile(["obscura/v1/obscura.proto"], [format!("{root}/proto")]).expect("a contract");
    let messages = &set.file[0].message_type;
    let frame = messages.iter().find(|message| message.name() == "WebSocketFrame").expect("a message");
    let reserved: Vec<_> = frame.reserved_range.iter().map(|range| (range.start(), range.end())).collect();
    assert_eq!(reserved, [(10, 11)], "from, and up to but without");
}

#[test]
fn generated_java_goes_where_clients_expect_it() {
    let root = env!("CARGO_MANIFEST_DIR");
    let set = protox::compile(["obscura/v1/obscura.proto"], [format!("{root}/proto")]).expect("a contract");
    let options = set.file[0].options.as_ref().expect("options");
    assert_eq!(options.java_package(), "xyz.obscura.server.contracts");
    assert_eq!(options.java_outer_classname(), "ObscuraProtocol");
}
