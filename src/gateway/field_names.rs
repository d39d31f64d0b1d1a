//! Maps the field names in the engine's errors to the field names of the HTTP API.

use crate::error::Error;

/// Fields whose name on a route differs from the engine's: (engine's name, client's name).
#[derive(Clone, Copy, Debug)]
pub(super) struct FieldNames(&'static [(&'static str, &'static str)]);

impl FieldNames {
    pub(super) const fn new(renamed: &'static [(&'static str, &'static str)]) -> Self {
        Self(renamed)
    }

    /// Replaces the engine's field name in an error by the client's name.
    pub(super) fn with_client_field_name(self, mut error: Error) -> Error {
        if let Some(param) = &mut error.param {
            let renamed = self.0.iter().find(|(engine_name, _)| engine_name == param);
            if let Some((_, client_name)) = renamed {
                (*client_name).clone_into(param);
            }
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_fields_as_the_client_names_them() {
        let names = FieldNames::new(&[("chat", "messages"), ("prompt", "messages")]);
        for (engine_name, client_name) in [
            ("chat", "messages"),
            ("prompt", "messages"),
            ("max_tokens", "max_tokens"),
        ] {
            let error = names.with_client_field_name(Error::invalid_value(engine_name, ""));
            assert_eq!(error.param.as_deref(), Some(client_name));
        }
    }
}
