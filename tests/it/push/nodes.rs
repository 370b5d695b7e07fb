//! Several nodes of one deployment. They need the services in every run: start the tests by `scripts/services`.

use std::path::Path;

use serde_json::json;

use super::provider::Answer;
use super::{Project, everything_due_is_pushed, phone, register};
use crate::harness::{Binary, Device, TestServer, deployment, eventually};

/// The attachments are of no concern here.
fn attachments(folder: &Path) -> String {
    format!("file:{}", folder.join("attachments").display())
}

#[tokio::test]
async fn two_nodes_push_once() {
    let project = Project::start().await;
    let folder = tempfile::tempdir().unwrap();
    let node = TestServer::start_node_with(|config| {
        project.configure(config);
        config.attachments.endpoint = Some(attachments(folder.path()));
    })
    .await;
    let other = node.start_beside().await;
    let alice = node.account().await;
    let there = alice.at(&other.client());
    let mut phones = Vec::new();
    for n in 0..20 {
        phones.push(phone(&node, &format!("phone{n}")).await);
    }
    for bob in &phones {
        alice.send_to(bob, "here").await;
        there.send_to(bob, "there").await;
    }
    for n in 0..20 {
        project.fcm.pushed(&format!("phone{n}"), 1).await;
    }
    everything_due_is_pushed(&node, &project.fcm, &alice).await;
    assert_eq!(project.fcm.pushes().len(), 21);
}

#[tokio::test]
async fn all_nodes_have_the_same_key_for_web_push() {
    let folder = tempfile::tempdir().unwrap();
    let node =
        TestServer::start_node_with(|config| config.attachments.endpoint = Some(attachments(folder.path()))).await;
    let other = node.start_beside().await;
    let alice = node.account().await;
    let key = async |alice: &Device| alice.request("GET", "/v1/push/vapid-key").send().await.expect(200).json();
    assert_eq!(key(&alice).await, key(&alice.at(&other.client())).await);
}

#[tokio::test]
async fn when_the_node_that_pushes_is_killed_another_one_does_it() {
    let project = Project::start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut options = deployment::distributed_options(folder.path()).await;
    options.retain(|option| !option.starts_with("--storage-"));
    options.push(format!("--storage-endpoint={}", attachments(folder.path())));
    options.extend(project.options());
    let mut dying = Binary::start_node(&options).await;
    let alice = Device::register(&dying.client()).await;
    let bob = Device::register(&dying.client()).await;
    register(&bob, json!({"token": "bob"})).await;
    project.fcm.set(Answer::Nothing);
    alice.send_to(&bob, "x").await;
    project.fcm.pushed("bob", 1).await;
    dying.kill();
    project.fcm.set(Answer::Status(200, json!({})));
    let living = Binary::start_node(&options).await;
    project.fcm.pushed("bob", 2).await;
    let queue = async || {
        let mut connection = redis::Client::open(deployment::service("OBSCURA_TEST_VALKEY_URL"))
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .unwrap();
        let key = options.iter().find_map(|option| option.strip_prefix("--push-queue-key=")).unwrap();
        redis::cmd("ZCARD").arg(key).query_async::<i64>(&mut connection).await.unwrap()
    };
    eventually("the job to be settled", async || queue().await == 0).await;
    assert_eq!(project.fcm.count("bob"), 2);
    drop(living);
    deployment::drop_state(folder.path());
}
