//! The look of a report: one HTML page that needs nothing from elsewhere. It knows nothing of what is
//! reported.

use std::fmt::Write as _;

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

/// The page with this title and this body.
pub(crate) fn whole(title: &str, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head>\
         <body><h1>{title}</h1>{body}</body></html>\n"
    )
}

/// Where and when a run was made.
pub(crate) fn stamp(machine: &Machine) -> String {
    let Machine {
        commit,
        cores,
        processor,
        kernel,
        load_before,
        load_after,
        build,
        ..
    } = machine;
    let text = format!(
        "Commit {commit} ({build} build), {cores} cores of {processor}, Linux {kernel}; load average \
         {load_before} before and {load_after} after."
    );
    format!("<p class=\"note\">{}</p>", escaped(&text))
}

/// Adds a picture with what is to be seen in it; nothing where there is none.
pub(crate) fn figure(body: &mut String, svg: &str, caption: &str) {
    if svg.is_empty() {
        return;
    }
    let caption = escaped(caption);
    // Writing to a string cannot fail.
    let _ = write!(
        body,
        "<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    );
}

/// A text as it stands between tags.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
