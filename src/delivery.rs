//! The last part of a token's way: a door writes it, and its connection flushes it to the socket. Both doors
//! learn here that it has left, and how long it took. It must not know what is written.

mod flush;
mod timer;

pub use flush::{FlushHandle, FlushTracker};
pub use timer::{DeliveryTimer, WriteStart};
