//! The HTTP listeners of a server: the HTTP API, and the admin listener with the routes for operators.

use std::sync::Arc;

use super::Server;
use super::listeners::addresses;
use super::parts::{AdminFrontend, HttpFrontend, ServerParts};
use crate::cluster::Cluster;
use crate::frontend::{self, LayerSettings};
use crate::gateway::{self, Gateway, LargeJson, Operations};
use crate::listen::{Listener, ListenerSettings, Protocol};
use crate::telemetry::ListenerKind;

impl Server {
    /// Starts the HTTP API.
    pub(super) fn serve_http(
        &mut self,
        listener: Listener,
        frontend: &HttpFrontend,
        cluster: Cluster,
        parts: &ServerParts,
    ) {
        self.http_addresses = addresses(Some(&listener));
        let open = self.health.clone();
        let gateway = Gateway {
            cluster,
            telemetry: self.telemetry.clone(),
            check_accepting: Arc::new(move || open.check_accepting()),
            stopping: self.stopping.clone(),
            stream_format: frontend.stream_format,
            unknown_fields: frontend.unknown_fields,
            headers_after: frontend.headers_after,
            large_json: LargeJson::default(),
            operator_routes: parts.operator_routes(),
        };
        let routes = gateway::routes(gateway, self.operations());
        let origins = frontend.origins(self.keys.is_some());
        let router = frontend::http_router(routes, origins, self.layer_settings(parts));
        let settings = ListenerSettings {
            tls: parts.tls_at(&listener.addresses()[0]),
            connections: Some(self.connections.clone()),
            ..self.listener_settings(ListenerKind::Http, Protocol::Http, &parts.limits)
        };
        let serving = self.public_listeners.serve(listener, settings, router);
        self.public_listeners
            .spawn_accept_loop(&self.critical, "HTTP listener", serving);
    }

    /// Starts the admin listener.
    pub(super) fn serve_admin(
        &mut self,
        listener: Listener,
        frontend: &AdminFrontend,
        parts: &ServerParts,
    ) {
        self.admin_addresses = addresses(Some(&listener));
        let needs_key = frontend.needs_key(self.keys.is_some());
        let layers = LayerSettings {
            authenticator: self.authenticator.clone().filter(|_| needs_key),
            ..self.layer_settings(parts)
        };
        let routes = gateway::admin_routes(self.operations());
        let router = frontend::http_router(routes, frontend.origins(needs_key), layers);
        let settings = ListenerSettings {
            tls: parts.tls_at(&listener.addresses()[0]),
            ..self.listener_settings(ListenerKind::Admin, Protocol::Http, &parts.limits)
        };
        let serving = self.admin_listeners.serve(listener, settings, router);
        self.admin_listeners
            .spawn_accept_loop(&self.critical, "admin listener", serving);
    }

    /// Returns the state of the routes for operators.
    fn operations(&self) -> Operations {
        let (ready, draining) = (self.health.clone(), self.health.clone());
        let (workers, devices) = (self.health.clone(), self.health.clone());
        Operations {
            telemetry: self.telemetry.clone(),
            check_ready: Arc::new(move || ready.check_ready()),
            worker_counts: Arc::new(move || workers.worker_counts()),
            devices: Arc::new(move || devices.devices()),
            start_drain: Arc::new(move || draining.set_draining()),
        }
    }
}
