//! The calls of one target that open a stream for a request. This module must not know which target is tried.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::timeout;
use tonic::Request;

use super::context::CallContext;
use super::failure::Failure;
use super::ladder::{
    Case, ChoiceRequest, Continuation, Delivered, Requests, Rung, Seam, TargetFacts, continuation,
    rungs,
};
use super::merged_choices::MergedChoices;
use super::policy::Fault;
use super::route::Target;
use super::upstream::{AddressedCompletion, BoxedEventStream};
use super::via::GatewayId;
use crate::grpc;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::tokenize_request::Input as TokenizeInput;
use crate::request::TokenId;

/// Longest wait for the number of the delivered tokens.
const TOKENIZER_TIMEOUT: Duration = Duration::from_secs(1);

/// A request that is sent to a target.
pub(super) struct TargetCall<'a> {
    pub(super) target: &'a Target,
    pub(super) message: &'a Arc<v1::CompletionRequest>,
    pub(super) context: &'a CallContext,
    pub(super) gateway: &'a GatewayId,
    /// Seed of the completion: the client's, or that of the first engine.
    pub(super) seed: Option<i64>,
}

/// A stream that an upstream has opened, and its seam to the delivered tokens.
pub(super) struct Opened {
    pub(super) events: BoxedEventStream,
    pub(super) seam: Seam,
    /// The rung that was taken. `None` if the client had nothing yet.
    pub(super) rung: Option<Rung>,
}

impl TargetCall<'_> {
    /// Checks that the target's engine supports all parameters of the request.
    pub(super) fn check_supported(&self) -> Result<(), Failure> {
        let unsupported = self.target.member.upstream.unsupported();
        match grpc::first_used_parameter(self.message, unsupported)? {
            None => Ok(()),
            Some(parameter) => Err(Failure::unsupported(parameter.name())),
        }
    }

    /// Opens a stream: of the whole completion, or of what the client does not have, by the first rung that the target
    /// accepts.
    pub(super) async fn open(self, delivered: &mut Delivered) -> Result<Opened, Failure> {
        let upstream = &self.target.member.upstream;
        if delivered.is_empty() {
            let message = AddressedCompletion {
                // The client may know the seed of an earlier try.
                seed: self.seed,
                ..self.addressed(Arc::clone(self.message))
            };
            let events = upstream.complete(self.request(message)).await?;
            return Ok(Opened {
                events,
                seam: Seam::continuing(delivered),
                rung: None,
            });
        }
        let case = Case {
            message: self.message,
            delivered,
            abilities: upstream.abilities(),
            is_same_model: delivered.is_same_model(&self.target.served_model()),
        };
        let mut refused = None;
        for rung in rungs(&case) {
            match self.climb(rung, delivered).await {
                Ok(opened) => return Ok(opened),
                // The rung, not the client's request, is at fault.
                Err(failure) if matches!(failure.fault(), Fault::Request | Fault::NotServed) => {
                    refused = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::not_continued(refused, self.message))
    }

    /// Opens the stream of one rung.
    async fn climb(&self, rung: Rung, delivered: &mut Delivered) -> Result<Opened, Failure> {
        if rung == Rung::Text {
            self.count_tokens(delivered).await;
        }
        let facts = TargetFacts {
            prompt_ids: match rung {
                Rung::TokenIds => self.prompt_ids().await?,
                Rung::Resume | Rung::Text | Rung::Replay => Vec::new(),
            },
            seed: self.seed.unwrap_or_default(),
        };
        let Continuation { requests, seam } = continuation(rung, self.message, delivered, &facts);
        let upstream = &self.target.member.upstream;
        let events: BoxedEventStream = match requests {
            Requests::Whole(message) => {
                let message = self.addressed(Arc::new(*message));
                upstream.complete(self.request(message)).await?
            }
            Requests::PerChoice(requests) => {
                Box::pin(self.open_choices(requests, delivered).await?)
            }
        };
        let rung = Some(rung);
        Ok(Opened { events, seam, rung })
    }

    /// Opens one stream for each choice that goes on, all at the same time.
    async fn open_choices(
        &self,
        requests: Vec<ChoiceRequest>,
        delivered: &Delivered,
    ) -> Result<MergedChoices, Failure> {
        let mut merged = MergedChoices::new(delivered);
        let (open, ended): (Vec<_>, Vec<_>) = requests
            .into_iter()
            .partition(|request| request.tokens_left != Some(0));
        ended.iter().for_each(|it| merged.push_ended(it.choice));
        let opening = open.into_iter().map(|request| async move {
            let (choice, known) = (request.choice, request.delivered_tokens);
            let repeated = request.repeated_tokens;
            let sent = AddressedCompletion {
                continues_message: request.continues_message,
                ..self.addressed(Arc::new(request.message))
            };
            let upstream = &self.target.member.upstream;
            let events = upstream.complete(self.request(sent)).await?;
            Ok::<_, Failure>((choice, known, repeated, events))
        });
        for (choice, known, repeated, events) in try_join_all(opening).await? {
            merged.push(choice, known, repeated, events);
        }
        Ok(merged)
    }

    /// Counts the delivered tokens with the target's tokenizer, if it has one. Otherwise each piece of text that an
    /// engine has sent counts as a token.
    async fn count_tokens(&self, delivered: &mut Delivered) {
        for (choice, text) in delivered.uncounted_texts() {
            let request = self.request(v1::TokenizeRequest {
                model: self.target.model.clone(),
                input: Some(TokenizeInput::Text(text)),
                add_special_tokens: Some(false),
            });
            let tokenizing = self.target.member.upstream.tokenize(request);
            if let Ok(Ok(tokenized)) = timeout(TOKENIZER_TIMEOUT, tokenizing).await {
                delivered.set_token_count(choice, tokenized.token_ids.len());
            }
        }
    }

    /// Returns the ids of the prompt's tokens, with the target's tokenizer.
    async fn prompt_ids(&self) -> Result<Vec<TokenId>, Failure> {
        let input = match &self.message.input {
            Some(Input::PromptTokenIds(prompt)) => return Ok(prompt.ids.clone()),
            Some(Input::Prompt(text)) => TokenizeInput::Text(text.clone()),
            Some(Input::Chat(chat)) => TokenizeInput::Chat(chat.clone()),
            None => return Ok(Vec::new()),
        };
        let request = self.request(v1::TokenizeRequest {
            model: self.target.model.clone(),
            input: Some(input),
            add_special_tokens: None,
        });
        let tokenized = self.target.member.upstream.tokenize(request).await;
        let tokenized = tokenized.map_err(|status| Failure::rejection(&status))?;
        Ok(tokenized.token_ids)
    }

    /// Addresses a message to the model under the name that the engine knows.
    fn addressed(&self, message: Arc<v1::CompletionRequest>) -> AddressedCompletion {
        AddressedCompletion {
            model: self.target.model.clone(),
            seed: message.seed,
            message,
            continues_message: false,
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        self.context.build_request(message, Some(self.gateway))
    }
}
