//! Watches the health of a remote engine.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tonic::Request;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::backoff::Backoff;
use crate::cluster::health::{Availability, HEALTH_CHECK_BACKOFF, HealthPublisher};
use crate::cluster::via::{GatewayId, Via};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;

/// Maximum wait for the model list of an engine that came up.
const LIST_MODELS_TIMEOUT: Duration = Duration::from_secs(1);

/// The task that keeps the health of an engine up to date.
pub(super) struct HealthWatch {
    /// Id of this gateway, to recognise an engine that is this gateway itself.
    pub(super) gateway: GatewayId,
    pub(super) health: HealthPublisher,
}

/// Result of asking an engine for its models.
enum ListedModels {
    Models(Vec<v1::Model>),
    /// The engine did not answer.
    Unknown,
    /// The engine is this gateway itself.
    Loop,
}

impl HealthWatch {
    /// Follows the health service of the engine. Ends if the engine turns out to be this gateway itself.
    pub(super) async fn run(self, channel: Channel) {
        let mut health = HealthClient::new(channel.clone());
        let mut inference = InferenceClient::new(channel);
        let mut backoff = Backoff::new(HEALTH_CHECK_BACKOFF);
        loop {
            if let Ok(response) = health.watch(HealthCheckRequest::default()).await {
                let mut reports = response.into_inner();
                while let Ok(Some(report)) = reports.message().await {
                    backoff.reset();
                    if report.status() != ServingStatus::Serving {
                        self.health.publish(Availability::Down, None);
                        continue;
                    }
                    match self.list_models(&mut inference).await {
                        ListedModels::Models(models) => {
                            self.health.publish(Availability::Up, Some(models))
                        }
                        ListedModels::Unknown => self.health.publish(Availability::Up, None),
                        ListedModels::Loop => {
                            self.health.publish(Availability::Loop, Some(Vec::new()));
                            return;
                        }
                    }
                }
            }
            self.health.publish(Availability::Down, None);
            sleep(backoff.next_delay()).await;
        }
    }

    async fn list_models(&self, inference: &mut InferenceClient<Channel>) -> ListedModels {
        let mut request = Request::new(v1::ListModelsRequest {});
        Via::default().write_with(&self.gateway, request.metadata_mut());
        match timeout(LIST_MODELS_TIMEOUT, inference.list_models(request)).await {
            Ok(Ok(listed)) => ListedModels::Models(listed.into_inner().models),
            Ok(Err(status)) if self.gateway.has_detected_loop(&status) => ListedModels::Loop,
            Ok(Err(_)) | Err(_) => ListedModels::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::runtime::Runtime;
    use tokio::sync::watch;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::transport::{Endpoint, Server};
    use tonic_health::server::health_reporter;

    use super::*;
    use crate::cluster::health::Health;
    use crate::cluster::spec::EngineSpec;

    async fn wait_for(health: &mut watch::Receiver<Health>, expected: Availability) {
        let changed = health.wait_for(|health| health.availability == expected);
        let changed = timeout(Duration::from_secs(10), changed).await;
        changed
            .expect("the engine's health changes within the timeout")
            .expect("the task that watches the engine's health is running");
    }

    #[tokio::test]
    async fn an_engine_is_up_while_it_reports_serving_and_is_reachable() {
        let (reporter, service) = health_reporter();
        // The engine runs on its own runtime, so that shutting down the runtime closes its connections.
        let engine = Runtime::new().unwrap();
        let bound = engine.spawn(TcpListener::bind("127.0.0.1:0"));
        let listener = bound.await.unwrap().unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let incoming = TcpListenerStream::new(listener);
        let server = Server::builder().add_service(service);
        engine.spawn(server.serve_with_incoming(incoming));
        let (publisher, mut health) =
            HealthPublisher::new(&EngineSpec::at(address.parse().unwrap()));
        assert!(health.borrow().is_up(), "an unknown state counts as up");
        let watching = HealthWatch {
            gateway: GatewayId::random(),
            health: publisher,
        };
        let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
        let watching = tokio::spawn(watching.run(channel));
        let not_serving = tonic_health::ServingStatus::NotServing;
        reporter.set_service_status("", not_serving).await;
        wait_for(&mut health, Availability::Down).await;
        let serving = tonic_health::ServingStatus::Serving;
        reporter.set_service_status("", serving).await;
        wait_for(&mut health, Availability::Up).await;
        engine.shutdown_background();
        wait_for(&mut health, Availability::Down).await;
        watching.abort();
    }
}
