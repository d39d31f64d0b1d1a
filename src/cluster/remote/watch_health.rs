//! Watches the health of a remote engine through the standard gRPC health service, which costs it no tokens.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::connections::EngineChannel;
use crate::backoff::Backoff;
use crate::cluster::health::{Availability, HEALTH_CHECK_BACKOFF, HealthPublisher};
use crate::proto::v1;

/// Maximum wait for the model list of an engine that came up.
const LIST_MODELS_TIMEOUT: Duration = Duration::from_secs(1);

/// The task that keeps the health of an engine up to date.
pub(in crate::cluster) struct HealthWatch<M> {
    /// Asked for the engine's models whenever the engine comes up.
    pub(in crate::cluster) models: M,
    pub(in crate::cluster) health: HealthPublisher,
}

/// The models of an engine, read over the engine's own protocol.
pub(in crate::cluster) trait ModelSource: Send {
    /// Asks the engine for its models.
    fn list(&mut self) -> impl Future<Output = ListedModels> + Send;
}

/// Result of asking an engine for its models.
pub(in crate::cluster) enum ListedModels {
    Models(Vec<v1::Model>),
    /// The engine did not answer.
    Unknown,
    /// The engine is this gateway itself.
    Loop,
}

impl<M: ModelSource> HealthWatch<M> {
    /// Follows the health service of the engine. Ends if the engine turns out to be this gateway itself.
    pub(in crate::cluster) async fn run(mut self, channel: EngineChannel) {
        let mut health = HealthClient::new(channel);
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
                    let listing = timeout(LIST_MODELS_TIMEOUT, self.models.list());
                    match listing.await.unwrap_or(ListedModels::Unknown) {
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
    use crate::cluster::remote::connections::connect;
    use crate::cluster::spec::EngineSpec;

    /// An engine that does not tell its models.
    struct NoModels;

    impl ModelSource for NoModels {
        async fn list(&mut self) -> ListedModels {
            ListedModels::Unknown
        }
    }

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
        let channel = connect(&Endpoint::from_shared(address.clone()).unwrap(), None);
        let watching = HealthWatch {
            models: NoModels,
            health: publisher,
        };
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
