//! Determines the route of a request, as metrics and log show it. The set of routes is closed.

use axum::extract::{MatchedPath, Request};
use axum::http::Method;

use crate::gateway;
use crate::grpc;
use crate::telemetry::{Api, Route, RouteKind};

/// RPCs of the health and reflection services, which the gRPC API serves besides its own.
const OTHER_RPCS: [(&str, RouteKind); 5] = [
    ("/grpc.health.v1.Health/Check", RouteKind::Probe),
    ("/grpc.health.v1.Health/List", RouteKind::Probe),
    ("/grpc.health.v1.Health/Watch", RouteKind::Probe),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        RouteKind::Unary,
    ),
    (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        RouteKind::Unary,
    ),
];

/// Determines the route of a request.
pub(super) fn find_route(api: Api, request: &Request) -> Route {
    match api {
        Api::Http => {
            let matched = request.extensions().get::<MatchedPath>();
            let path = matched.map_or("", MatchedPath::as_str);
            match find(path, &gateway::ROUTES) {
                // A browser's preflight request is answered by the CORS layer, not by the route.
                route if request.method() == Method::OPTIONS => Route {
                    kind: RouteKind::Unary,
                    ..route
                },
                route => route,
            }
        }
        // tonic routes by the service's name only, so the full path identifies the RPC.
        Api::Grpc => match find(request.uri().path(), &grpc::RPCS) {
            Route::UNMATCHED => find(request.uri().path(), &OTHER_RPCS),
            route => route,
        },
    }
}

fn find(path: &str, routes: &'static [(&'static str, RouteKind)]) -> Route {
    let found = routes.iter().find(|(name, _)| *name == path);
    found.map_or(Route::UNMATCHED, |(name, kind)| Route {
        name: name
            .strip_prefix("/")
            .filter(|rpc| rpc.contains('.'))
            .unwrap_or(name),
        kind: *kind,
    })
}
