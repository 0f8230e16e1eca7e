package kube

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// accountFolder is where a pod finds its service account.
const accountFolder = "/var/run/secrets/kubernetes.io/serviceaccount"

// server is one address of the API.
type server struct {
	url    string
	client *rest.RESTClient
}

// servers are all addresses of the API, any of which answers for all. All kinds
// use the same one until it fails.
type servers struct {
	all []*server

	mu  sync.Mutex
	now int
}

func (s *servers) current() *server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[s.now]
}

// leave goes on to the next address, unless that was done already.
func (s *servers) leave(failed *server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all[s.now] == failed {
		s.now = (s.now + 1) % len(s.all)
	}
}

// connect makes a client for each address. Nothing is sent yet.
func connect(settings Settings) (*servers, error) {
	config, err := access(settings)
	if err != nil {
		return nil, err
	}
	addresses := settings.Servers
	if len(addresses) == 0 {
		addresses = []string{config.Host}
	}
	config.QPS = -1 // what is asked is paced by feed
	config.UserAgent = "millrace"
	config.WarningHandler = rest.NoWarnings{}
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.NegotiatedSerializer = codecs()
	// A large list is compressed by one core of the API server, for every node.
	config.DisableCompression = true
	all := &servers{}
	for _, address := range addresses {
		s, err := dial(config, address)
		if err != nil {
			return nil, err
		}
		all.all = append(all.all, s)
	}
	return all, nil
}

func dial(config *rest.Config, address string) (*server, error) {
	text, err := serverURL(address)
	if err != nil {
		return nil, err
	}
	one := rest.CopyConfig(config)
	one.Host = text
	client, err := rest.HTTPClientFor(one)
	if err != nil {
		return nil, fmt.Errorf("prepare to talk to the API server %s: %w", text, err)
	}
	made, err := rest.UnversionedRESTClientForConfigAndClient(one, client)
	if err != nil {
		return nil, fmt.Errorf("prepare to talk to the API server %s: %w", text, err)
	}
	return &server{url: text, client: made}, nil
}

// serverURL completes an address: https where no scheme is named.
func serverURL(address string) (string, error) {
	text := strings.TrimSuffix(strings.TrimSpace(address), "/")
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http" || u.RawQuery != "" || u.User != nil {
		return "", fmt.Errorf("%q is no address of an API server: write one such as https://10.0.0.1:6443", address)
	}
	return text, nil
}

// access is how to prove who we are: by a kubeconfig or a pod's service account.
func access(settings Settings) (*rest.Config, error) {
	if settings.Kubeconfig == "" {
		return inPod(settings)
	}
	config, err := clientcmd.BuildConfigFromFlags("", settings.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", settings.Kubeconfig, err)
	}
	return config, nil
}

// inPod uses the service account that Kubernetes mounts into pods. Its token is
// read again before it expires.
func inPod(settings Settings) (*rest.Config, error) {
	token := filepath.Join(settings.Account, "token")
	if _, err := os.Stat(token); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read service account: %w: this is no pod with one; outside a pod name a kubeconfig, kube:PATH", err)
	} else if err != nil {
		return nil, fmt.Errorf("read service account: %w", err)
	}
	config := &rest.Config{
		BearerTokenFile: token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(settings.Account, "ca.crt")},
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host != "" && port != "" {
		config.Host = "https://" + net.JoinHostPort(host, port)
	}
	if config.Host == "" && len(settings.Servers) == 0 {
		return nil, errors.New("find the API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: name it with --api-server")
	}
	return config, nil
}

// codecs decode what is asked for, and nothing else: client-go's own list of all
// that Kubernetes has costs 15 MB of program.
func codecs() runtime.NegotiatedSerializer {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err) // the types disagree with each other: this program cannot work
		}
	}
	return serializer.NewCodecFactory(scheme).WithoutConversion()
}
