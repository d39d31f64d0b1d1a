//! One server's turn under the load.

use std::rc::Rc;

use tokio::time::timeout;

use super::Asked;
use super::seen::Seen;
use super::servers::Door;
use crate::load::{Fault, Figures, Session, Sockets, Target, Terms};

/// Puts the load on a server, and says what came of it.
pub(super) async fn turn(door: &Door, asked: &Rc<Asked>) -> Figures {
    let target = match door {
        Door::Http(url) => Target::Http(url.clone(), asked.form),
        Door::Grpc(url) => Target::Grpc(url.clone()),
    };
    let opening = Session::open(&target, Sockets::of(asked.load.streams));
    let opened = timeout(asked.timeout, opening).await;
    let session = match opened.unwrap_or_else(|_| Err(unreachable(asked))) {
        Ok(session) => session,
        Err(fault) => return Figures::of_fault(&fault),
    };
    let terms = Terms {
        model: asked.model.as_deref(),
        timeout: Some(asked.timeout),
    };
    let begin = {
        let asked = Rc::clone(asked);
        move |due_ns| Seen::begin(due_ns, &asked)
    };
    session.run_with(&asked.load, terms, begin).await
}

fn unreachable(asked: &Asked) -> Fault {
    Fault::Hangs {
        after: 0,
        seconds: asked.timeout.as_secs(),
    }
}
