use super::*;

/// The problems of a settings file with this text, without the file's path.
pub(super) fn problems(text: &str) -> Vec<String> {
    let (_folder, path) = settings_file(text);
    match read_line(&["config", "check", &path]) {
        Ok(ParsedCommand::Print(text)) => {
            assert_eq!(text, format!("{path} is valid\n"));
            Vec::new()
        }
        Ok(_) => panic!("the command is not `config check`"),
        Err(error) => {
            let lines = error.to_string();
            lines.lines().map(|line| line.replace(&path, "")).collect()
        }
    }
}

#[track_caller]
pub(super) fn assert_problems(text: &str, expected: &[&str]) {
    let problems = problems(text);
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem}");
    }
}

#[test]
fn a_valid_file_has_no_problems() {
    assert_problems("slots = 1\nengine = [\"http://a:1\"]", &[]);
    assert_problems(
        "queue_depth = 1\n[[model]]\nname = \"a\"\n[[model]]\nname = \"b\"",
        &[],
    );
}

#[test]
fn every_invalid_value_is_a_problem() {
    let text = "slots = 0\nhttp_listen = \"nowhere\"\nengine = [\"x\"]\ndrain_grace = 1\n\
                [[model]]\nworkers = 0\n[[model]]\nworkers = \"two\"";
    assert_problems(
        text,
        &[
            ":1:1: slots: must be at least 1",
            ":2:1: http_listen: ",
            ":3:1: engine: ",
            ":6:1: model[1].workers: must be at least 1",
            ":8:1: model[2].workers: invalid type",
        ],
    );
}

#[test]
fn every_unknown_key_is_a_problem_beside_the_values() {
    assert_problems(
        "slotz = 1\nany_model = 2\n[[model]]\nnamex = \"a\"",
        &[
            ":1:1: the key 'slotz' is unknown",
            ":2:1: any_model: invalid type",
            ":4:1: the key 'model[1].namex' is unknown",
        ],
    );
}

#[test]
fn every_syntax_error_is_a_problem() {
    let problems = problems("slots = \nthreads = 1\nworkers = [");
    assert!(problems[0].starts_with(":1:"), "{problems:?}");
    assert!(problems.last().unwrap().starts_with(":3:"), "{problems:?}");
}

#[test]
fn a_combination_that_no_command_accepts_is_a_problem() {
    assert_problems(
        "drain_grace = 1\nhttp_listen = \"0.0.0.0:1\"",
        &[":2:1: http_listen 0.0.0.0:1 can be reached from other machines"],
    );
    assert_problems(
        "runner = \"attached\"\nmodel_name = \"m\"",
        &[": --worker-listen is required"],
    );
    assert_problems(
        "drain_grace = 1\nengine = [\"http://a:1\", \"http://A:1\"]",
        &[":2:1: engine: http://A:1 is the same server as http://a:1; remove one of them"],
    );
}
