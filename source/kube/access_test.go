package kube

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// account writes a service account for a TLS server.
func account(t *testing.T, web *httptest.Server, token string) string {
	t.Helper()
	folder := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw})
	for name, data := range map[string][]byte{"token": []byte(token), "ca.crt": ca} {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

// In a pod: TLS, the account's token and CA, and the address from the environment
// or, where a Service is not to be trusted yet, as named.
func TestServiceAccount(t *testing.T) {
	for _, named := range []bool{false, true} {
		b := newBed(t)
		web := httptest.NewTLSServer(b.Server)
		t.Cleanup(web.Close)
		host, port, _ := net.SplitHostPort(web.Listener.Addr().String())
		settings := Settings{Node: "n1", Account: account(t, web, "the-token")}
		if named {
			settings.Servers = []string{web.Listener.Addr().String()}
			host, port = "", ""
		}
		t.Setenv("KUBERNETES_SERVICE_HOST", host)
		t.Setenv("KUBERNETES_SERVICE_PORT", port)
		var mu sync.Mutex
		said := map[string]bool{}
		b.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			said[r.Header.Get("Authorization")+" "+r.Header.Get("User-Agent")] = true
			return false
		})
		var err error
		if b.source, err = Open(settings); err != nil {
			t.Fatal(err)
		}
		b.apply(service("web", "10.96.0.2"))
		b.run()
		b.shows("web")
		mu.Lock()
		if len(said) != 1 || !said["Bearer the-token millrace"] {
			t.Errorf("said: %v", said)
		}
		mu.Unlock()
		b.end()
	}
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(broken, []byte("clusters: 7"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := kubeconfig(t, "https://192.0.2.1")
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "token"), []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for want, s := range map[string]Settings{
		"read kubeconfig /absent: ":                                {Kubeconfig: "/absent"},
		"read kubeconfig " + broken:                                {Kubeconfig: broken},
		"outside a pod name a kubeconfig":                          {Account: "/absent"},
		"find the API server: KUBERNETES_SERVICE_HOST":             {Account: folder},
		`"ftp://x" is no address of an API server`:                 {Kubeconfig: good, Servers: []string{"ftp://x"}},
		`"" is no address of an API server`:                        {Kubeconfig: good, Servers: []string{""}},
		`"https://u:p@x" is no address of an API server`:           {Kubeconfig: good, Servers: []string{"https://u:p@x"}},
		"prepare to talk to the API server https://192.0.2.1:6443": {Account: folder, Servers: []string{"192.0.2.1:6443"}},
	} {
		if _, err := Open(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", s, err, want)
		}
	}
}

// rules are the (group, resource, verb) that a manifest grants.
func rules(t *testing.T, path string) map[kubetest.Request]bool {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	granted := map[kubetest.Request]bool{}
	for d := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var doc struct {
			Kind  string
			Rules []struct {
				APIGroups []string `yaml:"apiGroups"`
				Resources []string
				Verbs     []string
			}
		}
		if err := d.Decode(&doc); errors.Is(err, io.EOF) {
			return granted
		} else if err != nil {
			t.Fatal(err)
		}
		for _, rule := range doc.Rules {
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						granted[kubetest.Request{Verb: verb, Group: group, Resource: resource}] = true
					}
				}
			}
		}
	}
}

// The role allows what is asked for, through a life with faults, and no more.
func TestRoleIsWhatIsAskedFor(t *testing.T) {
	granted := rules(t, "../../deploy/rbac.yaml")
	var err error
	b := newBed(t)
	b.run()
	b.shows("")
	b.watched()
	b.Cut(true)
	b.watched()
	b.Expire()
	b.apply(service("web", "10.96.0.2"))
	b.shows("web")
	b.watched()
	b.end()
	if b.source, err = Open(Settings{Kubeconfig: kubeconfig(t, b.url), Node: "n1", Names: true, Masquerade: true, Flannel: true}); err != nil {
		t.Fatal(err)
	}
	b.apply(masqueradeMap)
	b.run()
	b.until("the Corefile was asked for, and ip-masq-agent's configuration", func(s *model.Snapshot) bool { return s.DNS != nil && s.Masquerade != nil })
	b.apply(configMap)
	if _, err := ConfigMap(t.Context(), Settings{Kubeconfig: kubeconfig(t, b.url)}, "kube-system", "kube-proxy", "config.conf"); err != nil {
		t.Error(err)
	}
	asked := map[kubetest.Request]bool{}
	for _, r := range b.Requests() {
		asked[r] = true
		if !granted[r] {
			t.Errorf("%+v is asked for and not granted", r)
		}
	}
	for r := range granted {
		if !asked[r] {
			t.Errorf("%+v is granted and never asked for", r)
		}
	}
}

// A server without protobuf, such as an aggregating proxy, is understood too.
func TestJSON(t *testing.T) {
	b := newBed(t)
	var mu sync.Mutex
	accepted := map[string]bool{}
	b.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		accepted[r.Header.Get("Accept")] = true
		r.Header.Set("Accept", "application/json")
		return false
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.apply(slice("web", "10.244.1.2"))
	b.shows("web 10.244.1.2")
	b.watched()
	b.Cut(true)
	b.apply(slice("web", "10.244.1.3"))
	b.shows("web 10.244.1.3")
	mu.Lock()
	defer mu.Unlock()
	for accept := range accepted {
		if !strings.HasPrefix(accept, "application/vnd.kubernetes.protobuf") {
			t.Errorf("asked for %q first", accept)
		}
	}
}

// What is for another proxy or for DNS does not come, also when it becomes so.
func TestSelectors(t *testing.T) {
	b := newBed(t)
	labelled := func(label string) string {
		return strings.ReplaceAll(service("mine", "10.96.0.9"), "{name: mine}", "{name: mine, labels: {"+label+"}}")
	}
	b.apply(service("web", "10.96.0.2") + service("none", "None") + slice("web", "10.244.1.1") +
		strings.ReplaceAll(slice("none", "10.244.1.2"), "kubernetes.io/service-name: none", `kubernetes.io/service-name: none, service.kubernetes.io/headless: ""`) +
		strings.ReplaceAll(slice("alien", "10.244.1.3"), "kubernetes.io/service-name: alien", "other: x") +
		labelled("service.kubernetes.io/service-proxy-name: other"))
	b.run()
	if s := b.shows("web 10.244.1.1"); s.Unread > 0 || len(s.Problems) > 0 {
		t.Errorf("unread %d, %v", s.Unread, s.Problems)
	}
	b.apply(labelled("app: x"))
	b.shows("mine, web 10.244.1.1")
	b.apply(labelled("service.kubernetes.io/service-proxy-name: other"))
	b.shows("web 10.244.1.1")
}

// Who answers for names asks for those, too.
func TestNames(t *testing.T) {
	b := newBed(t)
	var err error
	if b.source, err = Open(Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{b.url}, Node: "n1", Names: true}); err != nil {
		t.Fatal(err)
	}
	b.apply(nodes + service("web", "10.96.0.2") + service("none", "None") + slice("web", "10.244.1.1") +
		strings.ReplaceAll(slice("none", "10.244.1.2"), "kubernetes.io/service-name: none", `kubernetes.io/service-name: none, service.kubernetes.io/headless: ""`) +
		strings.ReplaceAll(service("mine", "10.96.0.9"), "{name: mine}", "{name: mine, labels: {service.kubernetes.io/service-proxy-name: other}}"))
	b.run()
	s := b.until("all names are known", func(s *model.Snapshot) bool {
		return s.Complete && describe(s) == "none 10.244.1.2, web 10.244.1.1" && len(s.Others) == 1
	})
	if none := s.Services[1]; !s.Named || none.Name.Name != "none" || len(none.Endpoints) != 1 || none.Endpoints[0].Address.String() != "10.244.1.2" {
		t.Errorf("named %v, %+v", s.Named, none)
	}
}

// A burst becomes few Snapshots, of which the last is right; what changes
// nothing that anybody reads becomes none.
func TestBurst(t *testing.T) {
	b := newBed(t)
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.watched()
	before := len(b.snapshots())
	for range 100 {
		b.apply(strings.ReplaceAll(nodes, "status: {", "status: {phase: Running, "))
	}
	const changes = 1000
	begun := time.Now()
	for i := range changes {
		b.apply(slice("web", "10.244.1."+[]string{"1", "2", "3", "4"}[i%4]))
	}
	b.apply(slice("web", "10.244.9.9"))
	b.shows("web 10.244.9.9")
	made, took := len(b.snapshots())-before, time.Since(begun)
	t.Logf("%d changes became %d Snapshots in %v", changes, made, took)
	node := b.snapshots()[before-1].Nodes[0]
	for _, s := range b.snapshots()[before:] {
		if s.Nodes[0] != node {
			t.Error("a Snapshot because of what nobody reads")
		}
	}
	// On a busy machine the changes come no faster than Snapshots may.
	most := max(changes/2, int(took/spacing)/2)
	if made == 0 || made > most {
		t.Errorf("%d changes became %d Snapshots in %v, more than %d", changes, made, took, most)
	}
}

// What a Snapshot waits, for a processor that others have or for whoever takes it, does not
// count as work: the next change is not delayed by it. The shortest time between two counts.
func TestAWaitDelaysNoChange(t *testing.T) {
	b := newBed(t)
	b.pause = 50 * time.Millisecond
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.watched()
	for i := range 5 {
		address := fmt.Sprint("10.244.2.", i+1)
		b.apply(slice("web", address))
		b.shows("web " + address)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	shortest := time.Hour
	for i, at := range b.at[1:] {
		shortest = min(shortest, at.Sub(b.at[i]))
	}
	if shortest >= share*b.pause {
		t.Errorf("after a Snapshot that waited for %v the next came %v later", b.pause, shortest)
	}
}
