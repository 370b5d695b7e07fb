//! A collector of telemetry: it speaks OTLP over gRPC, with the contract's own types, and keeps what it gets.

use std::collections::BTreeMap;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::stream::unfold;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::eventually;

/// A running collector. Dropping it ends it, and its connections with it.
pub struct Collector {
    address: SocketAddr,
    scheme: &'static str,
    state: Arc<State>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    traces: Mutex<Vec<ExportTraceServiceRequest>>,
    metrics: Mutex<Vec<ExportMetricsServiceRequest>>,
    logs: Mutex<Vec<ExportLogsServiceRequest>>,
    is_frozen: AtomicBool,
}

/// A span, with the instance that sent it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub node: String,
    pub span: Span,
}

impl Seen {
    /// A word or a number that was written down with it.
    pub fn get(&self, key: &str) -> Option<String> {
        attribute(&self.span.attributes, key)
    }

    /// Whether this is a part of the other.
    pub fn is_part_of(&self, other: &Self) -> bool {
        self.span.trace_id == other.span.trace_id && self.span.parent_span_id == other.span.span_id
    }

    /// Whether it is linked with the other.
    pub fn is_linked_with(&self, other: &Self) -> bool {
        self.span.links.iter().any(|link| link.span_id == other.span.span_id && link.trace_id == other.span.trace_id)
    }

    pub fn keys(&self) -> Vec<&str> {
        self.span.attributes.iter().map(|attribute| attribute.key.as_str()).collect()
    }
}

impl Collector {
    /// On a port of its own.
    pub async fn start() -> Self {
        Self::start_on(([127, 0, 0, 1], 0).into()).await
    }

    /// At this address.
    pub async fn start_on(address: SocketAddr) -> Self {
        Self::launch(address, None).await
    }

    /// With TLS.
    pub async fn start_tls(acceptor: TlsAcceptor) -> Self {
        Self::launch(([127, 0, 0, 1], 0).into(), Some(acceptor)).await
    }

    async fn launch(address: SocketAddr, acceptor: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (state, scheme) = (Arc::<State>::default(), if acceptor.is_some() { "https" } else { "http" });
        let connections = Box::pin(unfold((listener, acceptor), async |(listener, acceptor)| {
            let stream = accept(&listener, acceptor.as_ref()).await;
            Some((Ok::<_, std::io::Error>(Incoming(stream)), (listener, acceptor)))
        }));
        let service = Service(state.clone());
        let server = tokio::spawn(async move {
            let router = Server::builder()
                .add_service(TraceServiceServer::new(service.clone()))
                .add_service(MetricsServiceServer::new(service.clone()))
                .add_service(LogsServiceServer::new(service));
            router.serve_with_incoming(connections).await.expect("the collector runs");
        });
        Self { address, scheme, state, server }
    }

    /// What `--otlp-endpoint` takes.
    pub fn url(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.address.port())
    }

    /// From now on it takes calls, and answers none.
    pub fn freeze(&self) {
        self.state.is_frozen.store(true, Ordering::Relaxed);
    }

    /// It answers again.
    pub fn thaw(&self) {
        self.state.is_frozen.store(false, Ordering::Relaxed);
    }

    /// All spans.
    pub fn spans(&self) -> Vec<Seen> {
        let requests = self.state.traces.lock().unwrap();
        let all = requests.iter().flat_map(|request| &request.resource_spans).flat_map(|from| {
            let node = node(from.resource.as_ref());
            let spans = from.scope_spans.iter().flat_map(|scope| &scope.spans);
            spans.map(move |span| Seen { node: node.clone(), span: span.clone() })
        });
        all.collect()
    }

    /// All spans of this name.
    pub fn named(&self, name: &str) -> Vec<Seen> {
        self.spans().into_iter().filter(|seen| seen.span.name == name).collect()
    }

    /// Waits for so many spans of this name.
    pub async fn await_spans(&self, name: &str, count: usize) -> Vec<Seen> {
        let what = format!("{count} times {name} at the collector");
        eventually(&what, async || self.named(name).len() >= count).await;
        self.named(name)
    }

    /// All log lines.
    pub fn log_lines(&self) -> Vec<LogRecord> {
        let requests = self.state.logs.lock().unwrap();
        let scopes = requests.iter().flat_map(|request| &request.resource_logs).flat_map(|from| &from.scope_logs);
        scopes.flat_map(|scope| scope.log_records.clone()).collect()
    }

    /// Whether such a log line has come.
    pub fn has_line(&self, text: &str) -> bool {
        self.log_lines().iter().any(|line| body(line).contains(text))
    }

    /// The names of all metrics.
    pub fn metric_names(&self) -> Vec<String> {
        let requests = self.state.metrics.lock().unwrap();
        let scopes = requests.iter().flat_map(|request| &request.resource_metrics).flat_map(|from| &from.scope_metrics);
        scopes.flat_map(|scope| scope.metrics.iter().map(|metric| metric.name.clone())).collect()
    }

    /// How often metrics have come.
    pub fn metric_exports(&self) -> usize {
        self.state.metrics.lock().unwrap().len()
    }

    /// What the spans, metrics and log lines say of who sent them.
    pub fn resources(&self) -> Vec<BTreeMap<String, String>> {
        let traces = self.state.traces.lock().unwrap();
        let metrics = self.state.metrics.lock().unwrap();
        let logs = self.state.logs.lock().unwrap();
        let of_traces = traces.iter().flat_map(|request| &request.resource_spans).map(|from| &from.resource);
        let of_metrics = metrics.iter().flat_map(|request| &request.resource_metrics).map(|from| &from.resource);
        let of_logs = logs.iter().flat_map(|request| &request.resource_logs).map(|from| &from.resource);
        let said = |resource: &Option<Resource>| {
            let attributes = resource.iter().flat_map(|resource| &resource.attributes);
            attributes.map(|attribute| (attribute.key.clone(), text(attribute.value.as_ref()))).collect()
        };
        of_traces.chain(of_metrics).chain(of_logs).map(said).collect()
    }

    /// Everything, as it came.
    pub fn bytes(&self) -> Vec<u8> {
        let traces = self.state.traces.lock().unwrap().iter().flat_map(|request| request.encode_to_vec()).collect();
        let metrics = self.state.metrics.lock().unwrap().iter().flat_map(|request| request.encode_to_vec()).collect();
        let logs = self.state.logs.lock().unwrap().iter().flat_map(|request| request.encode_to_vec()).collect();
        [traces, metrics, logs].into_iter().flat_map(|part: Vec<u8>| part).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What a log line says.
pub fn body(line: &LogRecord) -> String {
    text(line.body.as_ref())
}

fn node(resource: Option<&Resource>) -> String {
    let attributes = resource.map(|resource| resource.attributes.as_slice()).unwrap_or_default();
    attribute(attributes, "service.instance.id").expect("a node says which it is")
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    Some(text(attribute.value.as_ref()))
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

async fn accept(listener: &TcpListener, acceptor: Option<&TlsAcceptor>) -> Box<dyn Bytes> {
    loop {
        let (stream, _): (TcpStream, _) = listener.accept().await.expect("a connection");
        let Some(acceptor) = acceptor else { return Box::new(stream) };
        if let Ok(stream) = acceptor.accept(stream).await {
            return Box::new(stream);
        }
    }
}

/// A connection, with TLS or without.
struct Incoming(Box<dyn Bytes>);

impl Connected for Incoming {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[derive(Clone)]
struct Service(Arc<State>);

impl Service {
    async fn unless_frozen(&self) {
        if self.0.is_frozen.load(Ordering::Relaxed) {
            pending::<()>().await;
        }
    }
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.unless_frozen().await;
        self.0.traces.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Service {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.unless_frozen().await;
        self.0.metrics.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Service {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        self.unless_frozen().await;
        self.0.logs.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}
