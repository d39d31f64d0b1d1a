//! The field `stream_options`.

use utoipa::ToSchema;

use crate::error::Error;
use crate::gateway::fields::{Fields, Unsupported};

/// Extra data in a stream besides the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ToSchema)]
pub struct StreamOptions {
    /// Sends a final object with the usage and no choices.
    #[schema(required = false, nullable, default = false)]
    pub include_usage: bool,
    /// Adds the usage so far to every line.
    #[schema(required = false, nullable, default = false)]
    pub continuous_usage_stats: bool,
    /// Adds to every line when its token was scheduled (only by a runner with a schedule) and when it was emitted, in
    /// nanoseconds of CLOCK_MONOTONIC.
    #[schema(required = false, nullable, default = false)]
    pub include_stamps: bool,
    /// Sends a final object with the request's timings.
    #[schema(required = false, nullable, default = false)]
    pub include_timings: bool,
    /// Adds the token id to every line.
    #[schema(required = false, nullable, default = false)]
    pub return_token_ids: bool,
}

impl StreamOptions {
    /// OpenAI fields that this server does not support.
    pub(super) const UNSUPPORTED: &[Unsupported] = &[("include_obfuscation", "[true, false]")];

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        let mut flag = |name| Ok::<_, Error>(fields.take_bool(name)?.unwrap_or(false));
        let options = Self {
            include_usage: flag("include_usage")?,
            continuous_usage_stats: flag("continuous_usage_stats")?,
            include_stamps: flag("include_stamps")?,
            include_timings: flag("include_timings")?,
            return_token_ids: flag("return_token_ids")?,
        };
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        Ok(options)
    }
}
