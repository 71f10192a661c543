//! Doors for callers: the decision API over HTTP on loopback, on a Unix socket, and by TLS.
//!
//! The gateway authenticates, limits and forwards. It does not parse a request's body (the
//! interceptor does, once, INV-15), it cannot make a permit, and it reads no configuration but the
//! files of tokens and keys it is pointed at. Other machines reach it by TLS with a client
//! certificate only (`tls`): another TCP address than one of loopback is refused.
//!
//! What a request passes, in this order, each step before the next costs anything: the place it
//! claims to be sent to (`routes`), its credentials ([`auth`], [`tokens`], `oidc`, `signatures`), its scope, a
//! concurrency slot (`slots`), its body within size and time, the decision ([`doors`]). Around all
//! of it `connection` watches that nobody holds a socket for longer than he may, and [`refusals`]
//! counts whoever was turned away.
//!
//! Start reading at [`Gateway`] in `server`, then `routes`. [`client`] is the other side, for the
//! command line and the demo.

pub mod auth;
mod authzen;
pub mod client;
mod connection;
mod credentials;
pub mod doors;
mod envoy;
mod files;
mod guard;
pub mod limits;
mod listen;
mod nonces;
mod oidc;
mod openapi;
pub mod refusals;
mod routes;
mod server;
mod signatures;
mod slots;
mod stats;
mod tls;
pub mod tokens;
mod verifying;
pub mod wire;

pub use auth::{AuthConfig, Grant, Proxy, Scopes};
pub use client::{Client, ClientError};
pub use credentials::{CallerTime, CredentialFault, Moment, NoPattern, Pattern};
pub use doors::{BoxFuture, Decider, GiveUp, Operator, OperatorError};
pub use envoy::Proxies;
pub use files::FileError;
pub use listen::{ListenError, UnixDoor};
pub use oidc::{Jwks, JwksError, OidcIssuer, OidcRule};
pub use openapi::document as openapi_document;
pub use refusals::{RefusalWindow, Source};
pub use server::{
    Drained, Gateway, GatewayConfig, GatewayError, GatewayHandle, GatewayLimits, GatewayParts,
    OnRefused,
};
pub use stats::GatewayStats;
pub use tls::{CertifiedCallers, RefusedCertificate, TlsDoor};
pub use tokens::{TokenFileError, TokenSet};
