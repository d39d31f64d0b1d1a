//! Tests of child registration: a child worker's secret (`child_token`) is valid for one connection only.

use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::models::{ModelId, Models};
use crate::proto::worker as proto;
use crate::telemetry::Telemetry;
use crate::worker::WorkerId;
use crate::worker::attached::{
    AttachParts, AttachService, AttachableModel, TOKENIZER_CALL_TIMEOUT, WorkerTimeouts,
};
use crate::worker::wire::PROTOCOL_VERSION;

use super::Duration;

/// Creates the attach service of an engine with one model. Returns the service and the model's id.
fn service() -> (AttachService, ModelId) {
    let models = Models::for_test(&["model"]);
    let model = AttachableModel {
        name: "model".to_owned(),
        aliases: Vec::new(),
        slow_reader_timeout: Duration::from_secs(1),
    };
    let timeouts = WorkerTimeouts {
        heartbeat_timeout: Duration::from_secs(2),
        step_limit: None,
        tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
    };
    let (events, _) = mpsc::channel(1);
    let service = AttachService::new(AttachParts {
        models: models.map_values([model]),
        first_worker: 1,
        timeouts,
        events,
        telemetry: Telemetry::new(),
        tasks: TaskTracker::new(),
    });
    (service, models.entries()[0].id)
}

fn hello(child_token: &str) -> proto::Hello {
    proto::Hello {
        protocol_version: PROTOCOL_VERSION,
        child_token: child_token.to_owned(),
        ..proto::Hello::default()
    }
}

#[test]
fn a_child_token_is_valid_for_one_connection_only() {
    let (service, model) = service();
    let (_exit_sender, exit) = watch::channel(None);
    let register = |token| {
        let registration = service.check_hello(&hello(token)).unwrap();
        let error = registration.claim_child(token).err();
        error.map(|status| status.code())
    };
    for token in ["first start", "second start"] {
        assert_eq!(register(token), Some(Code::PermissionDenied));
        let _state = service.register_child(model, WorkerId(0), token.to_owned(), exit.clone());
        assert_eq!(register(token), None);
        assert_eq!(register(token), Some(Code::PermissionDenied));
        assert_eq!(register(""), None, "a worker without a token is accepted");
        service.unregister_child(model, token);
    }
}
