use super::*;

#[test]
fn a_stock_is_low_when_either_kind_that_is_used_is_below_the_threshold() {
    let stock = |ec, pq, uses_pq| PrekeyCounts { ec, pq, uses_pq };
    for (counts, is_low) in [
        (stock(20, 0, false), false),
        (stock(19, 0, false), true),
        (stock(20, 20, true), false),
        (stock(20, 19, true), true),
        (stock(19, 20, true), true),
    ] {
        assert_eq!(counts.is_below(20), is_low, "{counts:?}");
    }
    assert!(!stock(0, 0, true).is_below(0));
}

#[test]
fn damaged_keys_are_an_error_and_no_panic() {
    assert!(intact(PublicKey::from_bytes(&[5; 32])).is_err());
    assert!(pq_prekey(-1, &[], &[]).is_err());
}
