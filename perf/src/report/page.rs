//! The files of a report: one HTML page that loads nothing from other places, and JSON.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::Value;

use super::machine::Machine;

const STYLE: &str = "
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem;
         color: #1d2530; background: #fff }
  h1 { font-size: 1.8rem } h2 { margin-top: 2.5rem } figure { margin: 1rem 0; overflow-x: auto }
  figure svg { width: 100%; min-width: 700px; height: auto } figcaption, .note { color: #556; font-size: .9rem }
  table { border-collapse: collapse; width: 100%; font-size: .9rem }
  th, td { padding: .3rem .6rem; border-bottom: 1px solid #dde; text-align: left }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  .pass { color: #067a3f; font-weight: 600 } .fail { color: #b3261e; font-weight: 600 }
  pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: .8rem }";

/// A page, part by part from top to bottom.
pub(crate) struct Page {
    title: &'static str,
    body: String,
}

impl Page {
    /// A page that starts with this introduction, which is HTML.
    pub(crate) fn new(title: &'static str, introduction: &str) -> Self {
        let body = introduction.to_owned();
        Self { title, body }
    }

    /// Adds HTML.
    pub(crate) fn html(&mut self, html: &str) {
        self.body.push_str(html);
    }

    /// Adds the machine of the run.
    pub(crate) fn machine(&mut self, machine: &Machine) {
        let Machine {
            commit,
            build,
            cores,
            processor,
            kernel,
            load_before,
            load_after,
            ..
        } = machine;
        self.paragraph(
            "note",
            &format!(
                "Commit {commit} ({build} build), {cores} cores of {processor}, Linux {kernel}; load \
                 average {load_before} before and {load_after} after."
            ),
        );
    }

    /// Adds a paragraph of this CSS class.
    pub(crate) fn paragraph(&mut self, class: &str, text: &str) {
        self.element("p", class, text);
    }

    pub(crate) fn heading(&mut self, text: &str) {
        self.element("h2", "", text);
    }

    /// Adds lines of text under a heading of this CSS class.
    pub(crate) fn text(&mut self, class: &str, heading: &str, text: &str) {
        self.element("h2", class, heading);
        self.element("pre", "", text);
    }

    /// Adds a chart; an empty one is left out.
    pub(crate) fn figure(&mut self, svg: &str, caption: &str) {
        if svg.is_empty() {
            return;
        }
        let caption = escaped(caption);
        self.write(format_args!(
            "<figure>{svg}<figcaption>{caption}</figcaption></figure>"
        ));
    }

    /// Adds charts with their captions under a heading. Empty charts are left out, and the heading if all
    /// are empty.
    pub(crate) fn figures(&mut self, heading: &str, figures: &[(String, &str)]) {
        if figures.iter().all(|(svg, _)| svg.is_empty()) {
            return;
        }
        self.heading(heading);
        for (svg, caption) in figures {
            self.figure(svg, caption);
        }
    }

    /// Adds a row to a table.
    pub(crate) fn row(&mut self, cells: &[(&str, String)]) {
        self.html("<tr>");
        for (class, text) in cells {
            self.element("td", class, text);
        }
        self.html("</tr>");
    }

    /// Writes the page to the file of `--html`.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        let (title, body) = (escaped(self.title), &self.body);
        let page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <title>{title}</title><style>{STYLE}</style></head>\
             <body><h1>{title}</h1>{body}</body></html>\n"
        );
        fs::write(path, page).map_err(|error| with_flag("--html", path, &error))
    }

    fn element(&mut self, tag: &str, class: &str, text: &str) {
        let text = escaped(text);
        self.write(format_args!("<{tag} class=\"{class}\">{text}</{tag}>"));
    }

    fn write(&mut self, html: std::fmt::Arguments<'_>) {
        self.body
            .write_fmt(html)
            .expect("writing to a string cannot fail");
    }
}

/// Writes all measurements to the file of `--json`.
pub(crate) fn write_json(path: &Path, object: &Value) -> io::Result<()> {
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut file, object)?;
        file.write_all(b"\n")?;
        file.flush()
    };
    write().map_err(|error: io::Error| with_flag("--json", path, &error))
}

/// Names the flag and the file in an error.
fn with_flag(flag: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("{flag} {}: {error}", path.display()))
}

/// Escapes text for use between tags.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
