//! The ladder: how a completion goes on when its engine's stream breaks. These are pure structs; the stream of the
//! request sends the requests and reads the answers.

mod continuation;
mod delivered;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod message_parts;
mod rung;
mod seam;

pub(super) use continuation::{ChoiceRequest, Continuation, Requests, TargetFacts, continuation};
pub(super) use delivered::{Delivered, PromptPosition};
pub(crate) use rung::{Abilities, Rung};
pub(super) use rung::{Case, rungs};
pub(super) use seam::{Seam, SeamError};
