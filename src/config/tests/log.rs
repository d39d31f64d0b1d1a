use super::*;
use crate::logging::LogFormat;

fn log_format(arguments: &[&str]) -> LogFormat {
    match read_line(arguments) {
        Ok(ParsedCommand::Serve(server)) => server.log_format,
        Ok(_) => panic!("{arguments:?} is not a server command"),
        Err(error) => panic!("{arguments:?}: {error}"),
    }
}

#[test]
fn the_access_log_is_on_unless_it_is_disabled() {
    assert!(server_parts(&[]).access_log);
    assert!(server_parts(&["--access-log"]).access_log);
    assert!(!server_parts(&["--access-log", "false"]).access_log);
    let (_folder, path) = settings_file("access_log = false");
    assert!(!server_parts(&["--config", &path]).access_log);
    let gateway = ["gateway", "--engine", "http://a:1", "--access-log=false"];
    assert!(!server_parts(&gateway).access_log);
}

#[test]
fn the_log_format_is_human_or_json() {
    assert_eq!(log_format(&[]), LogFormat::Human);
    assert_eq!(log_format(&["--log-format", "json"]), LogFormat::Json);
    let (_folder, path) = settings_file("log_format = \"json\"");
    assert_eq!(log_format(&["--config", &path]), LogFormat::Json);
    let error = error_of(&["--log-format", "xml"]);
    for part in ["--log-format", "human", "json", "xml"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
