//! The workers that the engine starts itself: each has its token, and its seat once.

use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::proto::worker as proto;
use crate::telemetry::Telemetry;
use crate::worker::WorkerId;
use crate::worker::attached::{
    AttachService, AttachableModel, TOKENIZER_CALL_TIMEOUT, WorkerTimeouts,
};
use crate::worker::wire::PROTOCOL_VERSION;

use super::Duration;

/// The door of an engine with one model.
fn door() -> AttachService {
    let model = AttachableModel {
        name: "model".to_owned(),
        aliases: Vec::new(),
        slow_reader_timeout: Duration::from_secs(1),
    };
    let patience = WorkerTimeouts {
        heartbeat_timeout: Duration::from_secs(2),
        step_limit: None,
        tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
    };
    let (events, _) = mpsc::channel(1);
    let counted = (Telemetry::new(), TaskTracker::new());
    AttachService::new(vec![model], 1, patience, events, counted)
}

fn hello(child_token: &str) -> proto::Hello {
    proto::Hello {
        protocol_version: PROTOCOL_VERSION,
        child_token: child_token.to_owned(),
        ..proto::Hello::default()
    }
}

#[test]
fn a_child_token_admits_one_stream_only() {
    let door = door();
    let (_exited, exit) = watch::channel(None);
    let refusal = |token| {
        let refused = door.seat(&hello(token)).err();
        refused.map(|status| status.code())
    };
    for token in ["first life", "second life"] {
        assert_eq!(refusal(token), Some(Code::PermissionDenied));
        let _watch = door.expect(0, WorkerId(0), token.to_owned(), exit.clone());
        assert_eq!(refusal(token), None);
        assert_eq!(refusal(token), Some(Code::PermissionDenied));
        assert_eq!(refusal(""), None, "any other worker is welcome");
        door.forget(0, token);
    }
}
