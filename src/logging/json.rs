//! Log lines as JSON objects.
//!
//! A line has `timestamp`, `level`, `target` and `message`, followed by the fields of the event. A line that is
//! logged during a request also has the fields of the request's span, such as `id`. No key occurs twice.

use std::fmt::{self, Debug, Write as _};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use super::{Timestamps, WORKER_FIELDS};

/// Formats the fields of a tracing span as a JSON object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JsonFields;

/// Formats each tracing event as one line with a JSON object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JsonLines {
    /// Setting for the timestamps of the lines.
    pub timestamps: Timestamps,
}

impl FormatFields<'_> for JsonFields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'_>, fields: R) -> fmt::Result {
        let mut object = Object::default();
        fields.record(&mut object);
        write!(writer, "{}", Value::Object(object.0))
    }
}

impl<S> FormatEvent<S, JsonFields> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut object = Object::default();
        if self.timestamps == Timestamps::On {
            let mut timestamp = String::new();
            SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
            object.add("timestamp", timestamp);
        }
        object.add("level", metadata.level().as_str());
        object.add("target", metadata.target());
        event.record(&mut object);
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<JsonFields>>()
                && let Ok(Value::Object(fields)) = serde_json::from_str(&fields.fields)
            {
                object.add_all(fields);
            }
        }
        writeln!(writer, "{}", Value::Object(object.0))
    }
}

/// The fields of a line or a span. If a key occurs twice, its first value is kept.
#[derive(Default)]
struct Object(Map<String, Value>);

impl Object {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        if !self.0.contains_key(name) {
            self.0.insert(name.to_owned(), value.into());
        }
    }

    fn add_all(&mut self, fields: Map<String, Value>) {
        for (name, value) in fields {
            self.add(&name, value);
        }
    }
}

impl Visit for Object {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == WORKER_FIELDS
            && let Ok(Value::Object(fields)) = serde_json::from_str(value)
        {
            self.add_all(fields);
            return;
        }
        self.add(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        write!(text, "{value:?}").expect("writing to a `String` cannot fail");
        self.add(field.name(), text);
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex, PoisonError};

    use serde_json::json;

    use super::*;

    /// A log in memory.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            log.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Returns the lines that are logged while `log` runs.
    fn lines(log: impl FnOnce()) -> Vec<Value> {
        let written = Log::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields)
            .event_format(JsonLines {
                timestamps: Timestamps::Off,
            })
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = written.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8(bytes.clone()).expect("the log is UTF-8");
        let lines = text.lines().map(serde_json::from_str);
        lines.map(|line| line.expect("each line is JSON")).collect()
    }

    #[test]
    fn a_line_has_the_fields_of_the_event_and_of_the_requests_span() {
        let logged = lines(|| {
            let span = tracing::error_span!("request", id = "r1", api = "http");
            let _entered = span.enter();
            let absent: Option<u64> = None;
            tracing::warn!(slot = 3, absent, "line\n\"two\"");
        });
        let expected = json!({
            "level": "WARN",
            "target": "tokenway::logging::json::tests",
            "message": "line\n\"two\"",
            "slot": 3,
            "id": "r1",
            "api": "http",
        });
        assert_eq!(logged, [expected]);
    }

    #[test]
    fn the_fields_of_a_worker_process_become_fields_of_the_line() {
        let logged = lines(|| {
            let fields = json!({"id": "r1", "slot": 3, "level": "INFO"}).to_string();
            tracing::error!(worker = "worker-0", worker_fields = fields, "failed");
        });
        assert_eq!(logged[0]["id"], "r1");
        assert_eq!(logged[0]["slot"], 3);
        assert_eq!(logged[0]["level"], "ERROR");
        assert_eq!(logged[0]["worker"], "worker-0");
    }
}
