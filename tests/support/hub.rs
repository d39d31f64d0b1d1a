//! A small Hugging Face Hub with one repository, `org/repo`. Like the real one, it redirects downloads to another
//! server with signed addresses. It records all requests, and can damage responses.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::StreamExt;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use tokenway::hub::{Endpoint, HubError, HubOptions, fetch};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A file of the repository.
pub const FILE: &str = "m-Q4_K_M.gguf";

/// First commit of the repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Second commit of the repository, which [`TestHub::commit`] makes.
pub const SECOND_COMMIT: &str = "00000000c0ffee00000000c0ffee00000000c0ff";

/// A running Hub. It ends when it is dropped.
pub struct TestHub {
    pub endpoint: String,
    shared: Arc<Shared>,
    _servers: JoinSet<io::Result<()>>,
}

struct Shared {
    state: Mutex<HubState>,
    /// Address of the server that downloads are redirected to.
    storage: SocketAddr,
}

#[derive(Default)]
struct HubState {
    commit: &'static str,
    files: BTreeMap<String, Bytes>,
    /// Changes of the list of files.
    list: Option<fn(&mut Value)>,
    /// Token that the Hub requires, and its status for other tokens.
    required: Option<(String, StatusCode)>,
    /// Faults of the next downloads, in their order.
    faults: VecDeque<Fault>,
    requests: Vec<SeenRequest>,
}

/// A fault of one download.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The connection breaks after this many bytes.
    CutAfter(usize),
    /// Nothing arrives after this many bytes, and the connection stays open.
    StallAfter(usize),
    /// The response has this status.
    Status(StatusCode),
    /// The response has the whole file, although a part was requested.
    IgnoreRange,
    /// The response starts at the first byte, although a part was requested, and breaks after this many bytes.
    IgnoreRangeAndCutAfter(usize),
    /// The response redirects to this address.
    Redirect(&'static str),
    /// The response is a page that is not the file, with the status of a success.
    Page { has_length: bool },
    /// The last byte is wrong.
    WrongByte,
    /// The file has another byte at its end.
    Longer,
    /// The response claims to start one byte later.
    WrongRange,
}

/// A request that the Hub has received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenRequest {
    /// True for the server that downloads are redirected to.
    pub is_storage: bool,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

impl TestHub {
    /// Starts a Hub whose repository `org/repo` has these files.
    pub async fn start(files: &[(&str, &[u8])]) -> Self {
        let (hub, storage) = (listen().await, listen().await);
        let address =
            |listener: &TcpListener| listener.local_addr().expect("the listener is bound");
        let endpoint = format!("http://{}", address(&hub));
        let shared = Arc::new(Shared {
            storage: address(&storage),
            state: Mutex::new(HubState {
                commit: COMMIT,
                files: owned(files),
                ..HubState::default()
            }),
        });
        let hub_router = Router::new()
            .route("/api/models/org/repo/revision/main", get(list))
            .route("/org/repo/resolve/{commit}/{*file}", get(resolve))
            .route("/api/models/org/renamed/revision/main", get(renamed))
            .layer(from_fn_with_state(Arc::clone(&shared), check_token));
        let storage_router = Router::new().route("/{*file}", get(store));
        let record = |is_storage| {
            let shared = Arc::clone(&shared);
            from_fn_with_state((shared, is_storage), record_request)
        };
        let hub_router = hub_router
            .layer(record(false))
            .with_state(Arc::clone(&shared));
        let storage_router = storage_router
            .layer(record(true))
            .with_state(Arc::clone(&shared));
        let mut servers = JoinSet::new();
        servers.spawn(axum::serve(hub, hub_router).into_future());
        servers.spawn(axum::serve(storage, storage_router).into_future());
        Self {
            endpoint,
            shared,
            _servers: servers,
        }
    }

    /// Returns options for this Hub with the cache in this folder.
    pub fn options(&self, cache: &Path) -> HubOptions {
        let endpoint = Endpoint::parse(&self.endpoint).expect("a valid address");
        let mut options = HubOptions::new(endpoint, cache.to_owned());
        options.retry_delay = std::time::Duration::from_millis(1);
        options
    }

    /// Replaces the files of the repository, in its second commit.
    pub fn commit(&self, files: &[(&str, &[u8])]) {
        let mut state = self.state();
        state.commit = SECOND_COMMIT;
        state.files = owned(files);
    }

    /// Damages the next downloads, in this order.
    pub fn inject(&self, faults: &[Fault]) {
        self.state().faults.extend(faults);
    }

    /// Removes the faults that have not happened yet.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// Requires this token. Other requests get this status.
    pub fn require_token(&self, token: &str, status: StatusCode) {
        self.state().required = Some((format!("Bearer {token}"), status));
    }

    /// Changes the list of the repository's files.
    pub fn change_list(&self, change: fn(&mut Value)) {
        self.state().list = Some(change);
    }

    /// Returns all requests so far.
    pub fn requests(&self) -> Vec<SeenRequest> {
        self.state().requests.clone()
    }

    /// Returns the ranges of all downloads so far.
    pub fn downloads(&self) -> Vec<Option<String>> {
        let requests = self.requests().into_iter();
        let downloads = requests.filter(|request| request.is_storage);
        downloads.map(|request| request.range).collect()
    }

    fn state(&self) -> MutexGuard<'_, HubState> {
        self.shared.state()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn owned(files: &[(&str, &[u8])]) -> BTreeMap<String, Bytes> {
    let files = files.iter();
    files
        .map(|(path, bytes)| ((*path).to_owned(), Bytes::copy_from_slice(bytes)))
        .collect()
}

/// Contents of a file: 100 kB that do not repeat.
pub fn contents() -> Vec<u8> {
    let numbers = 0..25_000_u32;
    let bytes = numbers.flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes());
    bytes.collect()
}

/// Fetches the model `hf:org/repo` with this choice, such as `:Q8_0`.
pub async fn fetch_quietly(choice: &str, options: &HubOptions) -> Result<PathBuf, HubError> {
    let name = format!("hf:org/repo{choice}");
    let model = name.parse().expect("a valid name");
    fetch(&model, options, &|_| ()).await
}

/// Fetches a model that is not available. Returns the error.
pub async fn error_of(choice: &str, options: &HubOptions) -> String {
    match fetch_quietly(choice, options).await {
        Ok(path) => panic!("{} is available", path.display()),
        Err(error) => error.to_string(),
    }
}

/// Returns options of a Hub that does not listen.
pub fn unreachable(cache: &Path) -> HubOptions {
    let endpoint = Endpoint::parse("http://127.0.0.1:1").expect("a valid address");
    HubOptions::new(endpoint, cache.to_owned())
}

/// Returns the SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = digest(&SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Returns the path of a cached file of the first commit of `org/repo`.
pub fn snapshot(cache: &Path, file: &str) -> PathBuf {
    snapshot_of(COMMIT, cache, file)
}

/// Returns the path of a cached file of this commit of `org/repo`.
pub fn snapshot_of(commit: &str, cache: &Path, file: &str) -> PathBuf {
    let snapshots = cache.join("models--org--repo/snapshots");
    snapshots.join(commit).join(file)
}

/// Returns the path of the contents of a file of `org/repo` while they are downloaded.
pub fn incomplete(cache: &Path, bytes: &[u8]) -> PathBuf {
    let name = format!("{}.incomplete", sha256(bytes));
    cache.join("models--org--repo/blobs").join(name)
}

async fn listen() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").await;
    listener.expect("a free port exists")
}

async fn record_request(
    State((shared, is_storage)): State<(Arc<Shared>, bool)>,
    request: Request,
    next: Next,
) -> Response {
    let seen = SeenRequest {
        is_storage,
        path: request.uri().path().to_owned(),
        range: header(request.headers(), RANGE),
        authorization: header(request.headers(), AUTHORIZATION),
    };
    shared.state().requests.push(seen);
    next.run(request).await
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    let value = headers.get(name)?.to_str();
    Some(value.expect("a header in ASCII").to_owned())
}

async fn check_token(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let sent = request.headers().get(AUTHORIZATION).cloned();
    let required = shared.state().required.clone();
    match required {
        Some((token, status)) if sent.is_none_or(|sent| sent != token) => status.into_response(),
        _ => next.run(request).await,
    }
}

async fn list(State(shared): State<Arc<Shared>>) -> Response {
    let state = shared.state();
    let files = state.files.iter().map(|(path, bytes)| {
        let (sha256, size) = (sha256(bytes), bytes.len());
        json!({
            "rfilename": path,
            "size": size,
            "blobId": "b10b",
            "lfs": {"sha256": sha256, "size": size, "pointerSize": 134},
        })
    });
    let mut list =
        json!({"id": "org/repo", "sha": state.commit, "siblings": files.collect::<Vec<_>>()});
    if let Some(change) = state.list {
        change(&mut list);
    }
    list.to_string().into_response()
}

/// The Hub redirects the old name of a repository to its new one.
async fn renamed() -> Response {
    let location = [(LOCATION, "/api/models/org/repo/revision/main")];
    (StatusCode::TEMPORARY_REDIRECT, location).into_response()
}

async fn resolve(
    State(shared): State<Arc<Shared>>,
    UrlPath((_, file)): UrlPath<(String, String)>,
) -> Response {
    let location = format!(
        "http://localhost:{}/{file}?signature=x",
        shared.storage.port()
    );
    (StatusCode::FOUND, [(LOCATION, location)]).into_response()
}

async fn store(
    State(shared): State<Arc<Shared>>,
    UrlPath(file): UrlPath<String>,
    headers: HeaderMap,
) -> Response {
    let (fault, bytes) = {
        let mut state = shared.state();
        (state.faults.pop_front(), state.files.get(&file).cloned())
    };
    let Some(bytes) = bytes else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let mut bytes = bytes.to_vec();
    let size = bytes.len();
    match fault {
        Some(Fault::Status(status)) => return status.into_response(),
        Some(Fault::Redirect(address)) => {
            return (StatusCode::FOUND, [(LOCATION, address)]).into_response();
        }
        Some(Fault::Page { has_length: true }) => return "please log in".into_response(),
        Some(Fault::Page { has_length: false }) => {
            let page = futures_util::stream::iter([Ok::<_, io::Error>("please log in")]);
            return Body::from_stream(page).into_response();
        }
        Some(Fault::WrongByte) => bytes[size - 1] ^= 1,
        Some(Fault::Longer) => bytes.push(0),
        _ => {}
    }
    let range = headers.get(RANGE).map(|range| {
        let range = range.to_str().expect("a header in ASCII");
        let start = range
            .strip_prefix("bytes=")
            .and_then(|it| it.strip_suffix('-'));
        let start: usize = start.and_then(|it| it.parse().ok()).expect("an open range");
        start
    });
    let is_ignored = matches!(
        fault,
        Some(Fault::IgnoreRange | Fault::IgnoreRangeAndCutAfter(_))
    );
    let range = range.filter(|_| !is_ignored);
    let start = range.unwrap_or(0);
    let (status, mut response) = (
        range.map_or(StatusCode::OK, |_| StatusCode::PARTIAL_CONTENT),
        HeaderMap::new(),
    );
    response.insert(CONTENT_LENGTH, (bytes.len() - start).into());
    if range.is_some() {
        let claimed = start + usize::from(matches!(fault, Some(Fault::WrongRange)));
        let range = format!("bytes {claimed}-{}/{}", bytes.len() - 1, bytes.len());
        response.insert(CONTENT_RANGE, range.parse().expect("a header"));
    }
    (
        status,
        response,
        body(Bytes::from(bytes).slice(start..), fault),
    )
        .into_response()
}

/// Sends the bytes, or as many of them as the fault allows.
fn body(bytes: Bytes, fault: Option<Fault>) -> Body {
    let first = match fault {
        Some(
            Fault::CutAfter(count)
            | Fault::IgnoreRangeAndCutAfter(count)
            | Fault::StallAfter(count),
        ) => bytes.slice(..count),
        _ => return bytes.into(),
    };
    let sent = futures_util::stream::iter([Ok(first)]);
    match fault {
        Some(Fault::CutAfter(_) | Fault::IgnoreRangeAndCutAfter(_)) => {
            // The bytes reach the socket before the connection breaks.
            let broken = futures_util::stream::once(async {
                tokio::task::yield_now().await;
                Err(io::Error::other("the connection breaks"))
            });
            Body::from_stream(sent.chain(broken))
        }
        _ => Body::from_stream(sent.chain(futures_util::stream::pending())),
    }
}
