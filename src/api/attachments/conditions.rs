//! The header fields that make a download shorter: `If-None-Match`, `Range`, `If-Range` (RFC 9110, sections 13 and 14).

use std::ops::Range;

use axum::http::{HeaderMap, header};

use crate::model::ids::AttachmentId;

/// What a download answers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything.
    Whole,
    /// These bytes; there is at least one.
    Range(Range<u64>),
    /// The range that was asked for begins behind the end.
    Unsatisfiable,
}

/// An attachment never changes, so its id says which version it is.
pub fn entity_tag(id: AttachmentId) -> String {
    format!("\"{id}\"")
}

/// Whether `If-None-Match` says that the client has this attachment already. A bare id, without the quotes that it
/// should have, counts too: clients have been sending it.
pub fn is_known(headers: &HeaderMap, id: AttachmentId) -> bool {
    let lines = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|line| line.to_str().ok());
    let (tag, bare) = (entity_tag(id), id.to_string());
    lines.flat_map(|line| line.split(',')).map(str::trim).any(|item| {
        let item = item.strip_prefix("W/").unwrap_or(item);
        item == "*" || item == tag || item == bare
    })
}

/// The part that the client wants. What is not exactly one range of bytes is ignored, as is a range of another version.
pub fn requested_part(headers: &HeaderMap, id: AttachmentId, size: u64) -> Part {
    let is_of_this_version = headers.get(header::IF_RANGE).is_none_or(|tag| *tag == *entity_tag(id));
    let mut lines = headers.get_all(header::RANGE).iter();
    match (lines.next(), lines.next()) {
        (Some(line), None) if is_of_this_version => line.to_str().map_or(Part::Whole, |line| parse_range(line, size)),
        _ => Part::Whole,
    }
}

fn parse_range(line: &str, size: u64) -> Part {
    let Some((unit, range)) = line.split_once('=') else { return Part::Whole };
    let Some((first, last)) = range.trim().split_once('-') else { return Part::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Part::Whole;
    }
    let range = match (parse_digits(first), parse_digits(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Some(first), None) if last.is_empty() => first..size,
        (None, Some(length)) if first.is_empty() => size.saturating_sub(length)..size,
        _ => return Part::Whole,
    };
    if range.is_empty() { Part::Unsatisfiable } else { Part::Range(range) }
}

/// Reads digits and nothing else. A number too large to count to is as good as the largest.
fn parse_digits(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const SIZE: u64 = 1000;

    fn id() -> AttachmentId {
        AttachmentId::parse("67e55044-10b1-426f-9247-bb680e5fe0c8").unwrap()
    }

    fn with(name: header::HeaderName, values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn one_range_of_bytes_is_cut_to_the_size_and_everything_else_is_ignored() {
        let range = |range: Range<u64>| Part::Range(range);
        for (line, expected) in [
            ("bytes=0-0", range(0..1)),
            ("bytes=0-499", range(0..500)),
            ("bytes=999-999", range(999..1000)),
            ("bytes=500-", range(500..1000)),
            ("bytes=-1", range(999..1000)),
            ("bytes=-1000", range(0..1000)),
            ("bytes=-5000", range(0..1000)),
            ("bytes=0-99999999999999999999999", range(0..1000)),
            ("Bytes=1-2", range(1..3)),
            ("bytes = 1-2 ", range(1..3)),
            ("bytes=1000-", Part::Unsatisfiable),
            ("bytes=1000-2000", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=0-1,5-6", Part::Whole),
            ("bytes=0-1,", Part::Whole),
            ("bytes=2-1", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=", Part::Whole),
            ("bytes", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("bytes=1-2-3", Part::Whole),
            ("items=0-1", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(parse_range(line, SIZE), expected, "{line}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Part::Unsatisfiable);
        assert_eq!(parse_range("bytes=-5", 0), Part::Unsatisfiable);
    }

    #[test]
    fn a_range_of_another_version_or_on_two_lines_is_ignored() {
        let mut headers = with(header::RANGE, &["bytes=0-1"]);
        assert_eq!(requested_part(&headers, id(), SIZE), Part::Range(0..2));
        for (tag, expected) in [
            ("\"67e55044-10b1-426f-9247-bb680e5fe0c8\"", Part::Range(0..2)),
            ("W/\"67e55044-10b1-426f-9247-bb680e5fe0c8\"", Part::Whole),
            ("\"another\"", Part::Whole),
            ("Wed, 21 Oct 2015 07:28:00 GMT", Part::Whole),
        ] {
            headers.insert(header::IF_RANGE, HeaderValue::from_static(tag));
            assert_eq!(requested_part(&headers, id(), SIZE), expected, "{tag}");
        }
        assert_eq!(requested_part(&HeaderMap::new(), id(), SIZE), Part::Whole);
        assert_eq!(requested_part(&with(header::RANGE, &["bytes=0-1", "bytes=2-3"]), id(), SIZE), Part::Whole);
    }

    #[test]
    fn a_known_version_is_found_in_any_spelling_and_place() {
        for (lines, expected) in [
            (&[][..], false),
            (&["\"67e55044-10b1-426f-9247-bb680e5fe0c8\""], true),
            (&["67e55044-10b1-426f-9247-bb680e5fe0c8"], true),
            (&["W/\"67e55044-10b1-426f-9247-bb680e5fe0c8\""], true),
            (&["\"a\", W/\"67e55044-10b1-426f-9247-bb680e5fe0c8\""], true),
            (&["\"a\"", "\"67e55044-10b1-426f-9247-bb680e5fe0c8\""], true),
            (&["*"], true),
            (&["\"*\""], false),
            (&["\"67e55044-10b1-426f-9247-bb680e5fe0c9\""], false),
            (&["\"67E55044-10B1-426F-9247-BB680E5FE0C8\""], false),
            (&["\"a,67e55044-10b1-426f-9247-bb680e5fe0c8\""], false),
            (&[""], false),
        ] {
            assert_eq!(is_known(&with(header::IF_NONE_MATCH, lines), id()), expected, "{lines:?}");
        }
    }
}
