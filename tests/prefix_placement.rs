//! Placement of requests by a gateway: on the engine that has worked on the longest prefix of the prompt.

mod support;

use serde_json::{Value, json};
use support::http::{BodyEnd, Request, Response, post};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, silent_at};
use tokenway::cluster::PlacementPolicy;
use tokenway::server::Source;

/// Number of tokens after which an engine sends nothing more. Only the first turn of a conversation is that long.
const SILENT_AT: u32 = 5;

/// A conversation that grows with each turn.
struct Conversation(Vec<Value>);

impl Conversation {
    fn about(subject: &str) -> Self {
        let question = format!(
            "Tell me about {subject}. {}",
            "Take your time. ".repeat(300)
        );
        Self(vec![
            json!({"role": "system", "content": "You are a patient teacher."}),
            json!({"role": "user", "content": question}),
        ])
    }

    /// Begins the first turn. Its stream stays open, so it adds load to its engine.
    async fn begin(&self, gateway: &TestServer) -> Response {
        let mut stream = self.request(50, true).send(gateway).await;
        assert!(stream.read_line().await.is_some());
        stream
    }

    /// Adds an answer and the next question to the conversation, and sends it.
    async fn next_turn(&mut self, gateway: &TestServer) {
        self.0
            .push(json!({"role": "assistant", "content": "Gladly."}));
        self.0.push(json!({"role": "user", "content": "Go on."}));
        let (response, body) = self.request(3, false).fetch(gateway).await;
        assert_eq!(
            (response.status, body.end),
            (200, BodyEnd::Clean),
            "{}",
            body.text
        );
    }

    fn request(&self, max_tokens: u32, stream: bool) -> Request {
        let body = json!({"messages": self.0, "max_tokens": max_tokens, "stream": stream});
        post("/v1/chat/completions", body.to_string())
    }
}

/// Two engines behind a gateway.
struct Pair {
    engines: [TestServer; 2],
    gateway: TestServer,
}

impl Pair {
    async fn start(change: impl FnOnce(&mut Setup)) -> Self {
        let engine = || Setup::test_runner(silent_at(SILENT_AT)).start();
        let (first, second) = tokio::join!(engine(), engine());
        let mut gateway = Setup::gateway(&[&first, &second]);
        change(&mut gateway);
        Self {
            gateway: gateway.start().await,
            engines: [first, second],
        }
    }

    /// Returns the number of requests that were sent to each engine, by the label `prefix` of the metric.
    fn placements(&self) -> [[f64; 3]; 2] {
        let metrics = MetricsSnapshot::take(&self.gateway);
        self.engines.each_ref().map(|engine| {
            let engine = engine.grpc_url();
            ["cold", "warm", "warmer_elsewhere"].map(|prefix| {
                let labels = format!("{{engine=\"{engine}\",prefix=\"{prefix}\"}}");
                metrics.get(&format!("tokenway_engine_placements_total{labels}"))
            })
        })
    }

    /// Returns the engine that got the only request since `before`. Panics unless the request's prefix was warm there.
    fn warm_engine_since(&self, before: [[f64; 3]; 2]) -> usize {
        let after = self.placements();
        for engine in 0..2 {
            let [cold, warm, elsewhere] = before[engine];
            if after[engine] == [cold, warm + 1.0, elsewhere]
                && after[1 - engine] == before[1 - engine]
            {
                return engine;
            }
        }
        panic!("one engine gets the turn, where it is warm: {before:?}, {after:?}")
    }
}

#[tokio::test]
async fn each_conversation_stays_on_its_engine_and_moves_only_when_the_engine_is_gone() {
    let pair = Pair::start(|_| ()).await;
    let subjects = ["stars", "whales", "bridges", "glass"];
    let mut conversations = subjects.map(Conversation::about);
    let mut first_turns = Vec::new();
    for conversation in &conversations {
        first_turns.push(conversation.begin(&pair.gateway).await);
    }
    drop(first_turns);
    let mut engines = [Vec::new(), Vec::new()];
    for (number, conversation) in conversations.iter_mut().enumerate() {
        let before = pair.placements();
        conversation.next_turn(&pair.gateway).await;
        engines[pair.warm_engine_since(before)].push(number);
    }
    assert!(engines.iter().all(|it| !it.is_empty()), "{engines:?}");
    for _turn in 3..6 {
        for (engine, numbers) in engines.iter().enumerate() {
            for number in numbers {
                let before = pair.placements();
                conversations[*number].next_turn(&pair.gateway).await;
                assert_eq!(pair.warm_engine_since(before), engine);
            }
        }
    }
    let metrics = MetricsSnapshot::take(&pair.gateway);
    for engine in &pair.engines {
        let series = format!("{{engine=\"{}\"}}", engine.grpc_url());
        let tokens = metrics.get(&format!("tokenway_engine_warm_prompt_tokens_total{series}"));
        assert!(tokens > 3_000.0, "{tokens}");
    }

    let Pair { engines, gateway } = pair;
    let [gone, there] = engines;
    drop(gone);
    for conversation in &mut conversations {
        conversation.next_turn(&gateway).await;
        conversation.next_turn(&gateway).await;
    }
    drop(there);
}

#[tokio::test]
async fn without_an_index_conversations_are_placed_by_load_alone() {
    let pair = Pair::start(|gateway| {
        let Source::Remote(cluster) = &mut gateway.parts.source else {
            panic!("the server is not a gateway")
        };
        cluster.placement = PlacementPolicy::LeastLoad;
    })
    .await;
    let mut conversation = Conversation::about("stars");
    let _first_turn = conversation.begin(&pair.gateway).await;
    let tries = |engine: &TestServer| {
        let engine = engine.grpc_url();
        let series = format!("{{engine=\"{engine}\",outcome=\"ok\"}}");
        let metrics = MetricsSnapshot::take(&pair.gateway);
        metrics.get(&format!("tokenway_engine_tries_total{series}"))
    };
    assert_eq!(pair.engines.each_ref().map(tries), [1.0, 0.0]);
    conversation.next_turn(&pair.gateway).await;
    assert_eq!(pair.engines.each_ref().map(tries), [1.0, 1.0]);
    assert_eq!(pair.placements(), [[0.0; 3]; 2]);
}
