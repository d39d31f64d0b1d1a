//! The load: many streams at once through one door, with a client that does nothing but read, check
//! and time. It is one thread, and no part of the server's process.
//!
//! The load is open loop: a paced stream's tokens come when the device makes them, whatever the client
//! does, and each is judged by its own stamps, so that a stall counts against all that it delayed.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use tokenway::runner::monotonic_ns;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::sleep;

mod channel;
mod figures;
mod grpc;
mod http;
mod lines;
mod message;

pub(crate) use figures::{Figures, Times};
pub(crate) use http::Form;

use crate::arguments::ServerUrl;
use crate::device::Device;

/// What is asked of a door.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// How many streams run at once.
    pub(crate) streams: u32,
    /// How many requests each of them makes, one after the other.
    pub(crate) requests: u32,
    /// How many tokens each request asks for.
    pub(crate) tokens: u32,
    /// Whether tokens carry their stamps, and their times are taken.
    pub(crate) timed: bool,
    /// Over how long the streams' beginnings are spread.
    pub(crate) spread: Duration,
}

/// Where a stream notes what it sees.
type Notes = Rc<RefCell<Figures>>;

/// Why a stream is no good.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Http2(#[from] h2::Error),
    #[error("the server answered {0}")]
    Refused(String),
    #[error("token_{expected} was due, and {found} came")]
    Order { expected: u32, found: String },
    #[error("the stream ended after {0} tokens without its end")]
    CutOff(u32),
    #[error("the stream has what belongs to none: {0}")]
    Malformed(String),
}

/// Where the load goes.
#[derive(Clone)]
pub(crate) enum Target {
    /// A device of this process, by its channels.
    Device(Device),
    /// A server's HTTP door, or its floor.
    Http(ServerUrl, Form),
    /// A server's gRPC door, or its floor.
    Grpc(ServerUrl),
}

/// Puts the load on a target, and says what came of it.
pub(crate) async fn run(target: &Target, load: &Load) -> Figures {
    let tasks = LocalSet::new();
    let ran = tasks.run_until(streams(target, load)).await;
    ran.unwrap_or_else(|fault| {
        let mut figures = Figures::new();
        figures.fault(fault.to_string());
        figures
    })
}

/// Runs the streams as tasks of this thread.
async fn streams(target: &Target, load: &Load) -> Result<Figures, Fault> {
    let notes: Notes = Rc::new(RefCell::new(Figures::new()));
    let connections = match target {
        Target::Grpc(url) => grpc::connect(url, load.streams).await?,
        Target::Device(_) | Target::Http(..) => Vec::new(),
    };
    let mut tasks = JoinSet::new();
    let began_ns = monotonic_ns();
    for stream in 0..load.streams {
        let (notes, load, target) = (Rc::clone(&notes), load.clone(), target.clone());
        let connection = grpc::of_stream(&connections, stream);
        tasks.spawn_local(async move {
            sleep(load.spread * stream / load.streams).await;
            let ended = match (&target, connection) {
                (Target::Grpc(url), Some(connection)) => {
                    grpc::stream(url, connection, &load, &notes).await
                }
                (Target::Http(url, form), _) => http::stream(url, *form, &load, &notes).await,
                (Target::Device(device), _) => channel::stream(device, &load, &notes).await,
                (Target::Grpc(_), None) => Err(Fault::CutOff(0)),
            };
            if let Err(fault) = ended {
                notes.borrow_mut().fault(fault.to_string());
            }
        });
    }
    // A stream that panics is a bug of this program's, and its panic is told.
    while tasks.join_next().await.is_some() {}
    let mut figures = notes.replace(Figures::new());
    figures.ended(began_ns);
    Ok(figures)
}

/// The body of a request over HTTP, and over a bare socket.
fn body(load: &Load) -> String {
    let options = if load.timed {
        r#","stream_options":{"include_stamps":true}"#
    } else {
        ""
    };
    let tokens = load.tokens;
    format!(r#"{{"prompt":"Count the tokens.","max_tokens":{tokens},"stream":true{options}}}"#)
}
