//! The other side of the doors: a small client for the command line, the demo and tests.
//!
//! It keeps connections alive and uses as many as there are requests at once. A request is sent a
//! second time only when the first attempt never left: a decision that may have been recorded is
//! never asked for twice.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::limits::{CLIENT_HEAD_BYTES_MAX, CLIENT_IDLE_MAX, CLIENT_RESPONSE_BYTES_MAX};
use crate::wire::REQUEST_ID;

/// A connection that was idle for longer is not used again: the gateway may be closing it.
const REUSE_WITHIN: Duration = Duration::from_secs(30);

/// How long a request may take, unless said otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which door to knock at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Door {
    /// The TCP door.
    Tcp(SocketAddr),
    /// The Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Nobody opened.
    #[error("no node answers at {door}: {reason}; is it running")]
    Connect {
        /// Where.
        door: String,
        /// What the system said.
        reason: String,
    },
    /// The token cannot stand in a header.
    #[error("the token holds characters that no token has")]
    Token,
    /// The path cannot stand in a request.
    #[error("{0:?} is not a path of the decision API")]
    Path(String),
    /// The connection broke. Whether the request was carried out is not known.
    #[error("the connection to {door} broke off before the answer: {reason}")]
    Broken {
        /// Where.
        door: String,
        /// What happened.
        reason: String,
    },
    /// No whole answer in time. Whether the request was carried out is not known.
    #[error("no answer from {door} within {waited:?}")]
    Timeout {
        /// Where.
        door: String,
        /// How long.
        waited: Duration,
    },
    /// The answer is longer than any that is waited for.
    #[error("the answer from {door} is longer than {limit} bytes")]
    TooLong {
        /// Where.
        door: String,
        /// How long it may be.
        limit: usize,
    },
    /// What came back is no HTTP.
    #[error("what {door} answered is no HTTP: {reason}")]
    Malformed {
        /// Where.
        door: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name cannot stand in a header.
    #[error("{0:?} is no name of a host")]
    Host(String),
}

type Sender = SendRequest<Full<Bytes>>;

/// An answer with the request's id as it came back.
#[derive(Debug)]
pub struct Answered {
    /// The status.
    pub status: u16,
    /// `X-Request-ID`, if it stands there once.
    pub id: Option<HeaderValue>,
    /// The body.
    pub body: Bytes,
}

/// A client of one door of one node.
pub struct Client {
    door: Door,
    host: HeaderValue,
    authorization: Option<HeaderValue>,
    patience: Duration,
    answer_bytes_max: usize,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    idle: Mutex<Vec<(Sender, Instant)>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("door", &self.door)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client of this door, with this bearer token if there is one. Connects when first used.
    ///
    /// # Errors
    ///
    /// [`ClientError::Token`] when the token is none.
    pub fn new(door: Door, token: Option<&str>) -> Result<Self, ClientError> {
        let authorization = token
            .map(|token| {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .map_err(|_| ClientError::Token)?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        let host = match &door {
            Door::Tcp(address) => HeaderValue::from_str(&address.to_string()).ok(),
            Door::Unix(_) => None,
        };
        Ok(Self {
            door,
            host: host.unwrap_or(HeaderValue::from_static("localhost")),
            authorization,
            patience: PATIENCE,
            answer_bytes_max: CLIENT_RESPONSE_BYTES_MAX,
            tls: None,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// How long one request may take, from connecting to the last byte of the answer.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Speaks TLS at a TCP door, with whoever proves to be `name`; `host` is what requests call it.
    ///
    /// # Errors
    ///
    /// [`ClientError::Host`] when that cannot stand in a request.
    pub fn tls(
        mut self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        host: &str,
    ) -> Result<Self, ClientError> {
        self.host = HeaderValue::from_str(host).map_err(|_| ClientError::Host(host.to_owned()))?;
        self.tls = Some((TlsConnector::from(config), name));
        Ok(self)
    }

    /// How long an answer may be.
    #[must_use]
    pub fn answer_bytes_max(mut self, limit: usize) -> Self {
        self.answer_bytes_max = limit;
        self
    }

    /// Sends a JSON body to `path` with this `X-Request-ID`.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when there is no whole answer. An answer of any status is no error.
    pub async fn post_json_as(
        &self,
        path: &str,
        id: HeaderValue,
        body: impl Into<Bytes>,
    ) -> Result<Answered, ClientError> {
        self.exchange(Method::POST, path, body.into(), Some(id))
            .await
    }

    /// Sends a JSON body to `path`; status and body of the answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when there is no whole answer. An answer of any status is no error.
    pub async fn post_json(
        &self,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<(u16, Bytes), ClientError> {
        let answered = self.exchange(Method::POST, path, body.into(), None);
        answered
            .await
            .map(|answered| (answered.status, answered.body))
    }

    /// Gets `path`; status and body of the answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when there is no whole answer. An answer of any status is no error.
    pub async fn get(&self, path: &str) -> Result<(u16, Bytes), ClientError> {
        let answered = self.exchange(Method::GET, path, Bytes::new(), None);
        answered
            .await
            .map(|answered| (answered.status, answered.body))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        id: Option<HeaderValue>,
    ) -> Result<Answered, ClientError> {
        let mut request = Request::new(Full::new(body));
        *request.uri_mut() = path
            .parse()
            .map_err(|_| ClientError::Path(path.to_owned()))?;
        if method == Method::POST {
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(CONTENT_TYPE, json);
        }
        *request.method_mut() = method;
        request.headers_mut().insert(HOST, self.host.clone());
        if let Some(authorization) = &self.authorization {
            request
                .headers_mut()
                .insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(id) = id {
            request.headers_mut().insert(REQUEST_ID, id);
        }
        tokio::time::timeout(self.patience, self.send(request))
            .await
            .unwrap_or_else(|_| {
                Err(ClientError::Timeout {
                    door: self.door.to_string(),
                    waited: self.patience,
                })
            })
    }

    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Answered, ClientError> {
        loop {
            let (mut sender, fresh) = match self.take_idle().await {
                Some(sender) => (sender, false),
                None => (self.connect().await?, true),
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let status = response.status().as_u16();
                    let mut ids = response.headers().get_all(REQUEST_ID).iter();
                    let id = match (ids.next(), ids.next()) {
                        (Some(id), None) => Some(id.clone()),
                        _ => None,
                    };
                    let body = self.read(response).await?;
                    self.keep(sender);
                    return Ok(Answered { status, id, body });
                }
                Err(mut error) => match error.take_message() {
                    // It never left, on a connection that had been idle: try another.
                    Some(unsent) if !fresh => request = unsent,
                    _ if error.error().is_parse() => {
                        return Err(ClientError::Malformed {
                            door: self.door.to_string(),
                            reason: error.error().to_string(),
                        });
                    }
                    _ => return Err(self.broken(error.error())),
                },
            }
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let limited = Limited::new(response.into_body(), self.answer_bytes_max);
        match limited.collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(ClientError::TooLong {
                door: self.door.to_string(),
                limit: self.answer_bytes_max,
            }),
            Err(error) => Err(self.broken(&*error)),
        }
    }

    fn broken(&self, error: &(dyn std::error::Error + 'static)) -> ClientError {
        ClientError::Broken {
            door: self.door.to_string(),
            reason: error.to_string(),
        }
    }

    async fn take_idle(&self) -> Option<Sender> {
        loop {
            let (mut sender, since) = self
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop()?;
            if since.elapsed() < REUSE_WITHIN && !sender.is_closed() && sender.ready().await.is_ok()
            {
                return Some(sender);
            }
        }
    }

    fn keep(&self, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < CLIENT_IDLE_MAX {
            idle.push((sender, Instant::now()));
        }
    }

    async fn connect(&self) -> Result<Sender, ClientError> {
        let refused = |error: std::io::Error| ClientError::Connect {
            door: self.door.to_string(),
            reason: error.to_string(),
        };
        match &self.door {
            Door::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(refused)?;
                stream.set_nodelay(true).map_err(refused)?;
                match &self.tls {
                    None => self.greet(stream).await,
                    Some((tls, name)) => {
                        let stream = tls.connect(name.clone(), stream).await;
                        self.greet(stream.map_err(refused)?).await
                    }
                }
            }
            Door::Unix(path) => {
                self.greet(UnixStream::connect(path).await.map_err(refused)?)
                    .await
            }
        }
    }

    async fn greet<S>(&self, stream: S) -> Result<Sender, ClientError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = Builder::new()
            .max_buf_size(CLIENT_HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(&error))?;
        // It ends when the sender is dropped or the node hangs up; its errors reach the sender.
        tokio::spawn(connection);
        Ok(sender)
    }
}
