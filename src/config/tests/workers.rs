use std::time::Duration;

use super::*;
use crate::server::Isolation;

#[test]
fn worker_processes_run_this_program_with_the_same_settings() {
    let parts = server_parts(&[
        "--isolation",
        "process",
        "--workers",
        "3",
        "--slots",
        "5",
        "--test-runner-frequency-ms",
        "2.5",
        "--model-name",
        "m",
    ]);
    let model = &engine(&parts).models[0];
    let Isolation::Process(program) = &model.isolation else {
        panic!("the workers are threads");
    };
    assert_eq!(program.arguments, ["worker", "--settings-from-stdin"]);
    assert_eq!(model.workers, 3);
    assert_eq!(
        program.settings,
        "model_name = \"m\"\nrunner = \"llm_test\"\nslots = 5\n\
         test_runner_first_token_delay_ms = 0\ntest_runner_frequency_ms = 2.5\n\
         test_runner_prompt_token_delay_ms = 0\n"
    );
    let worker = worker_from_stdin(&program.settings).unwrap();
    let parts = worker.parts.build(&ModelFiles::new()).unwrap();
    assert_eq!((parts.slots, &*parts.model), (5, "m"));
}

/// The worker that gets these settings on standard input.
fn worker_from_stdin(settings: &str) -> Result<WorkerTask, ConfigError> {
    let line = [
        "tokenway",
        "worker",
        "--engine",
        "unix:/workers.sock",
        "--device",
        "1",
    ];
    let matches = command_line().try_get_matches_from(line)?;
    AttachSettings::worker_task(worker_settings(innermost_matches(&matches), settings)?)
}

#[test]
fn a_worker_rejects_settings_from_standard_input_that_it_does_not_know() {
    let error = worker_from_stdin("model_name = \"m\"\nqueue_depth = 1")
        .err()
        .unwrap();
    let expected = "standard input:2:1: the key 'queue_depth' is unknown";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn worker_timeouts_and_resumptions_can_be_set() {
    let workers = engine(&server_parts(&[])).workers.clone();
    assert_eq!(workers.timeouts.heartbeat_timeout, Duration::from_secs(2));
    assert_eq!(workers.timeouts.step_limit, Some(Duration::from_secs(30)));
    assert_eq!(workers.resumption.max_consecutive, 2);
    assert_eq!(
        workers.resumption.acceptance_timeout,
        Duration::from_secs(60)
    );
    let arguments = [
        "--heartbeat-timeout",
        "0.5",
        "--step-limit",
        "0",
        "--max-resumptions",
        "7",
        "--resume-timeout",
        "3",
    ];
    let workers = engine(&server_parts(&arguments)).workers.clone();
    assert_eq!(
        workers.timeouts.heartbeat_timeout,
        Duration::from_millis(500)
    );
    assert_eq!(workers.timeouts.step_limit, None);
    assert_eq!(workers.resumption.max_consecutive, 7);
    assert_eq!(
        workers.resumption.acceptance_timeout,
        Duration::from_secs(3)
    );
}

#[test]
fn an_attached_model_needs_a_name_and_a_worker_socket_and_takes_no_local_workers() {
    let attached = ["--runner", "attached", "--model-name", "m"];
    let listen = ["--worker-listen", "unix:/workers.sock"];
    let parts = server_parts(&[&attached[..], &listen].concat());
    assert_eq!(engine(&parts).models[0].workers, 0);
    for (arguments, expected) in [
        (&[&attached[..]].concat(), "--worker-listen"),
        (&[&attached[..2], &listen].concat(), "--model-name"),
        (
            &[&attached[..], &listen, &["--slots", "3"]].concat(),
            "--slots",
        ),
        (
            &[&attached[..], &listen, &["--workers", "3"]].concat(),
            "--workers",
        ),
        (
            &[&attached[..], &["--worker-listen", "127.0.0.1:1"]].concat(),
            "worker connections over TCP require mutual TLS",
        ),
        (
            &["--heartbeat-timeout", "0.01"].to_vec(),
            "--heartbeat-timeout",
        ),
        (
            &["worker", "--engine", "unix:/a", "--runner", "attached"].to_vec(),
            "--runner attached",
        ),
        (&["worker", "--engine", "nowhere"].to_vec(), "--engine"),
        (
            &["worker", "--engine", "a:1", "--worker-tls-ca", "/a"].to_vec(),
            "set all of --worker-tls-ca",
        ),
    ] {
        let error = error_of(arguments);
        assert!(error.contains(expected), "{error}");
    }
}
