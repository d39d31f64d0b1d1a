//! The tokenizer APIs of vLLM and of llama.cpp's server, which are not part of OpenAI's API. Their paths are beside
//! `/v1`.

use http::header::CONTENT_TYPE;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::client::EngineClient;
use super::flavor::Flavor;
use super::rejection;
use super::request_body::chat::{self, Message};
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::tokenize_request::Input;
use crate::request::{RequestId, TokenId};

/// Maximum size of an answer, in bytes. The ids of a text of the maximum body size, one for each byte, take about this.
const MAX_ANSWER_BYTES: usize = 32 * 1024 * 1024;

/// The tokenizer of one model of an engine, for one request.
pub(super) struct EngineTokenizer<'a> {
    pub(super) client: &'a EngineClient,
    pub(super) flavor: Flavor,
    /// Name of the model on the engine.
    pub(super) model: &'a str,
    pub(super) request_id: &'a RequestId,
}

/// `POST /tokenize` of vLLM.
#[derive(Serialize)]
struct VllmTokenize<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<Vec<Message<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    add_special_tokens: Option<bool>,
}

/// `POST /tokenize` of llama.cpp.
#[derive(Serialize)]
struct LlamaCppTokenize<'a> {
    model: &'a str,
    content: &'a str,
    add_special: bool,
    with_pieces: bool,
}

/// `POST /apply-template` of llama.cpp.
#[derive(Serialize)]
struct ApplyTemplate<'a> {
    model: &'a str,
    messages: Vec<Message<'a>>,
}

/// `POST /detokenize` of both.
#[derive(Serialize)]
struct Detokenize<'a> {
    model: &'a str,
    tokens: &'a [TokenId],
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<TokenId>,
}

/// A text. `/detokenize` of llama.cpp calls it `content`, the others `prompt`.
#[derive(Deserialize)]
struct Text {
    #[serde(alias = "content")]
    prompt: String,
}

impl EngineTokenizer<'_> {
    /// Converts text or a chat into token ids.
    ///
    /// # Errors
    /// The engine has no tokenizer API, or rejects the input.
    pub(super) async fn tokenize(
        &self,
        request: &v1::TokenizeRequest,
    ) -> Result<Vec<TokenId>, Error> {
        let Some(input) = &request.input else {
            let message = "One of text and chat is required.";
            return Err(Error::new(ErrorKind::MissingParameter, message).with_param("text"));
        };
        let add_special_tokens = request.add_special_tokens;
        let answer: Tokens = match self.flavor {
            Flavor::Vllm => {
                let (prompt, messages) = match input {
                    Input::Text(text) => (Some(&**text), None),
                    Input::Chat(chat) => (None, Some(chat::messages(chat, self.flavor))),
                };
                let body = VllmTokenize {
                    model: self.model,
                    prompt,
                    messages,
                    add_special_tokens,
                };
                self.post("/tokenize", &body).await?
            }
            Flavor::LlamaCpp | Flavor::LlamaCppV1 => {
                let rendered;
                let content = match input {
                    Input::Text(text) => text,
                    Input::Chat(chat) => {
                        rendered = self.render_chat(chat).await?;
                        &rendered
                    }
                };
                let body = LlamaCppTokenize {
                    model: self.model,
                    content,
                    add_special: add_special_tokens.unwrap_or(true),
                    with_pieces: false,
                };
                self.post("/tokenize", &body).await?
            }
            Flavor::Other => return Err(no_tokenizer()),
        };
        Ok(answer.tokens)
    }

    /// Converts token ids into text.
    ///
    /// # Errors
    /// The engine has no tokenizer API, or rejects the ids.
    pub(super) async fn detokenize(&self, tokens: &[TokenId]) -> Result<String, Error> {
        if self.flavor == Flavor::Other {
            return Err(no_tokenizer());
        }
        let body = Detokenize {
            model: self.model,
            tokens,
        };
        let answer: Text = self.post("/detokenize", &body).await?;
        Ok(answer.prompt)
    }

    /// Renders a chat with the model's chat template (llama.cpp).
    async fn render_chat(&self, chat: &v1::Chat) -> Result<String, Error> {
        let body = ApplyTemplate {
            model: self.model,
            messages: chat::messages(chat, self.flavor),
        };
        let answer: Text = self.post("/apply-template", &body).await?;
        Ok(answer.prompt)
    }

    async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, Error> {
        let body = serde_json::to_vec(body).map_err(|_| Error::internal())?;
        let request = Request::post(self.client.root_target(path))
            .header(CONTENT_TYPE, "application/json")
            .header("x-request-id", &*self.request_id.0)
            .body(Full::from(body));
        let request = request.map_err(|_| Error::internal())?;
        let response = self.client.send(request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(no_tokenizer());
        }
        if !response.status().is_success() {
            return Err(rejection::read_rejection(response).await.into());
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        let body = body.await.map_err(|error| {
            tracing::debug!(%error, "cannot read the answer of an engine's tokenizer");
            upstream_error("The answer of the engine's tokenizer broke off or is too large.")
        })?;
        serde_json::from_slice(&body.to_bytes())
            .map_err(|_| upstream_error("The answer of the engine's tokenizer has no known form."))
    }
}

fn no_tokenizer() -> Error {
    let message = "The model's engine has no tokenizer API.";
    Error::new(ErrorKind::NotFound, message)
}

fn upstream_error(message: &str) -> Error {
    Error::new(ErrorKind::UpstreamError, message)
}
