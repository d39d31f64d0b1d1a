//! The start-up lines about a server: its addresses, keys, TLS and host names.

use crate::gateway::{self, OperatorRoutes};
use crate::keys::Keys;
use crate::listen::Address;
use crate::output::Output;
use crate::server::{Server, ServerParts};

/// HTTP paths that the start-up line prints between the completion paths and the routes for operators. For all paths
/// see `/openapi.json`.
const CLIENT_PATHS: [&str; 4] = ["/v1/models", "/tokenize", "/detokenize", "/health"];

/// Paths of the health routes, which the admin listener has besides the routes for operators.
const HEALTH_PATHS: [&str; 3] = ["/livez", "/readyz", "/health"];

/// Printed when other machines can reach the server only by its IP address.
const HOSTS_NOTE: &str =
    "HTTP clients can use localhost and IP addresses; add a host name with --allowed-hosts NAME";

/// Printed when other machines can reach the server without TLS.
const TLS_NOTE: &str = "off: prompts, completions and keys are not encrypted; set --tls-cert and --tls-key, or use a \
                        proxy that adds TLS";

/// The facts of a server's settings that the start-up lines show.
pub(super) struct Surfaces {
    has_tls: bool,
    tls: Option<String>,
    rejects_host_names: bool,
    operator_routes: OperatorRoutes,
    /// True if the server has keys, and the admin listener needs none.
    admin_is_open: bool,
}

impl Surfaces {
    pub(super) fn of(parts: &ServerParts) -> Self {
        let has_keys = parts.keys.is_some();
        let admin = parts.admin.as_ref();
        Self {
            has_tls: parts.tls.is_some(),
            tls: tls_line(parts),
            rejects_host_names: parts.rejects_host_names(),
            operator_routes: parts.operator_routes(),
            admin_is_open: has_keys && admin.is_some_and(|admin| !admin.needs_key(has_keys)),
        }
    }

    /// Prints the lines, with the addresses on which the server listens.
    pub(super) fn print(&self, server: &Server, out: &Output) {
        self.print_addresses(server, out);
        if let Some(keys) = server.keys() {
            out.write_line(format_args!("keys     {}", keys_line(keys)));
        }
        if let Some(tls) = &self.tls {
            out.write_line(format_args!("tls      {tls}"));
        }
        if self.rejects_host_names {
            out.write_line(format_args!("hosts    {HOSTS_NOTE}"));
        }
    }

    fn print_addresses(&self, server: &Server, out: &Output) {
        let operator_paths = self.operator_routes.paths().iter().copied();
        for address in server.http_addresses() {
            let url = url(address, self.has_tls);
            let paths = gateway::completion_paths().chain(CLIENT_PATHS);
            let paths = paths.chain(operator_paths.clone()).chain(["/openapi.json"]);
            let paths = paths.collect::<Vec<_>>().join(" ");
            out.write_line(format_args!("HTTP     {url}  {paths}"));
        }
        for address in server.grpc_addresses() {
            let hint = match address {
                Address::Tcp(_) => "",
                // For a Unix socket, gRPC libraries for these languages send the socket's path as the host name
                // (docs/deployment.md).
                Address::Unix(_) => {
                    "; in Python, C++ and Java set grpc.default_authority to localhost"
                }
            };
            let url = url(address, self.has_tls);
            out.write_line(format_args!(
                "gRPC     {url}  tokenway.v1.Inference, health, reflection{hint}"
            ));
        }
        for address in server.admin_addresses() {
            let url = url(address, self.has_tls);
            let paths = [OperatorRoutes::All.paths(), &HEALTH_PATHS]
                .concat()
                .join(" ");
            let keys = match self.admin_is_open {
                true => "; needs no key",
                false => "",
            };
            out.write_line(format_args!("admin    {url}  {paths}{keys}"));
        }
    }
}

/// Says how many keys there are, and which routes need none.
fn keys_line(keys: &Keys) -> String {
    let count = keys.count();
    let source = match keys.file() {
        Some(file) => format!("{count} in force, from {}", file.display()),
        None => format!("{count} in force"),
    };
    format!("{source}; /livez, /readyz, /health and gRPC's health and reflection need none")
}

/// Says which certificate the server uses, or that other machines can reach it without TLS.
fn tls_line(parts: &ServerParts) -> Option<String> {
    let Some(tls) = &parts.tls else {
        let mut addresses = parts.listen_addresses();
        let is_public = addresses.any(|(_, address)| !address.is_loopback());
        return is_public.then(|| TLS_NOTE.to_owned());
    };
    let certificate = tls.certificate_path().display();
    let clients = match tls.requires_client_certificate() {
        true => "; clients must present a certificate",
        false => "",
    };
    Some(format!("certificate {certificate}{clients}"))
}

fn url(address: &Address, has_tls: bool) -> String {
    match address {
        Address::Tcp(address) if has_tls => format!("https://{address}"),
        Address::Tcp(address) => format!("http://{address}"),
        Address::Unix(_) => address.to_string(),
    }
}
