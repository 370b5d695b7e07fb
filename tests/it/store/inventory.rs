//! What the database holds: `inventory`.

use obscura_server::model::ids::AttachmentId;
use obscura_server::store::{Allowance, Inventory, Reservation};

use super::fixture::{NOW, TestStore, fcm};
use super::messages::to;

#[tokio::test]
async fn everything_that_is_kept_is_counted() {
    let store = TestStore::open().await;
    assert_eq!(store.inventory().await.unwrap(), Inventory::default());
    let (alice, bob) = (store.account().await, store.account().await);
    let mail = [to(&alice, &bob, "1234"), to(&alice, &bob, "12345678")];
    store.commit_group(&mail, &[], NOW).await.unwrap();
    store.set_push_target(bob.no, i64::MAX, &fcm("token")).await.unwrap();
    for size in [100, 30] {
        let allowance = Allowance { quota_bytes: 0, bytes_per_day: 0 };
        store
            .reserve_attachment(Reservation {
                user: alice.user,
                id: AttachmentId::random(),
                size,
                now: NOW,
                born: NOW,
                allowance,
            })
            .await
            .unwrap();
    }
    let expected = Inventory {
        users: 2,
        devices: 2,
        messages: 2,
        message_bytes: 6,
        oldest: NOW.millis(),
        attachments: 2,
        attachment_bytes: 130,
        push_tokens: 1,
    };
    assert_eq!(store.inventory().await.unwrap(), expected);
}
