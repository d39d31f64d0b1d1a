//! The decisions about tries: which target gets a request, whether it is tried again, and which engine is left alone.
//! They are plain synchronous structs, without I/O.

mod breaker;
mod load;
mod placement;
mod recent_count;
mod retry_budget;
mod try_plan;

pub(crate) use breaker::BreakerState;
pub(super) use breaker::{Breaker, EngineResult, Passage};
pub(super) use load::{
    BYTES_PER_TOKEN, Load, OutstandingTokens, WeightedLoad, expected_prompt_tokens,
};
pub(super) use retry_budget::RetryBudget;
pub(super) use try_plan::{Fault, NextTry, TargetView, TryPlan};
