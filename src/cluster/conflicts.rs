//! Mistakes in a list of engines: an engine that is listed twice, and an engine that is the gateway itself. This module
//! must not know where the list comes from.

use super::spec::EngineSpec;

#[cfg(test)]
mod tests;

/// An engine that must not be in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EngineConflict {
    /// Index of the engine in the list.
    pub(crate) engine: usize,
    /// Description of the problem. It begins with the address of the engine.
    pub(crate) problem: String,
}

impl EngineConflict {
    /// Returns an error message for a caller that does not know the setting behind each engine.
    pub(crate) fn message(&self, engines: &[EngineSpec]) -> String {
        let problem = &self.problem;
        match engines.get(self.engine) {
            Some(engine) if *engine.name != *engine.address.as_str() => {
                format!("engine '{}': {problem}", engine.name)
            }
            Some(_) | None => format!("--engine: {problem}"),
        }
    }
}

/// Finds the engines that are the same server as an earlier one, and those that are the gateway itself. The gateway
/// listens on `listeners`: each has the name of its setting, such as `http-listen`, and its address, which is
/// `host:port` or `unix:/path`.
pub(crate) fn find_conflicts(
    engines: &[EngineSpec],
    listeners: &[(&str, String)],
) -> Vec<EngineConflict> {
    let problems = engines.iter().enumerate().filter_map(|(at, engine)| {
        let problem = same_as_earlier(engine, &engines[..at]);
        let problem = problem.or_else(|| same_as_gateway(engine, listeners))?;
        let problem = format!("{} {problem}", engine.address);
        Some(EngineConflict {
            engine: at,
            problem,
        })
    });
    problems.collect()
}

fn same_as_earlier(engine: &EngineSpec, earlier: &[EngineSpec]) -> Option<String> {
    let mut earlier = earlier.iter();
    let first = earlier.find(|it| it.address.reaches_same_server(&engine.address))?;
    let first = match &first.name {
        name if **name == *first.address.as_str() => first.address.to_string(),
        name => format!("the engine '{name}' ({})", first.address),
    };
    Some(format!("is the same server as {first}; remove one of them"))
}

fn same_as_gateway(engine: &EngineSpec, listeners: &[(&str, String)]) -> Option<String> {
    let mut listeners = listeners.iter();
    let (setting, address) =
        listeners.find(|(_, address)| engine.address.matches_listener(address))?;
    Some(format!(
        "is the address of this gateway itself (--{setting} {address}); choose another address for the gateway with \
         --{setting}, or correct the address of the engine"
    ))
}
