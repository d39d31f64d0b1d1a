//! HTML pages, rendered from `perf/templates/`.

use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;

const TEMPLATES: [(&str, &str); 5] = [
    ("base.html", include_str!("../../templates/base.html")),
    ("compare.html", include_str!("../../templates/compare.html")),
    ("model.html", include_str!("../../templates/model.html")),
    (
        "overhead.html",
        include_str!("../../templates/overhead.html"),
    ),
    ("soak.html", include_str!("../../templates/soak.html")),
];

/// Renders a template. Text values are escaped.
pub(super) fn render(template: &str, values: &impl Serialize) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    for (name, source) in TEMPLATES {
        environment.add_template(name, source)?;
    }
    environment.get_template(template)?.render(Serde(values))
}
