package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/source/kube"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// proxyServer is an API server that has the ConfigMap of one kube-proxy, and takes patches
// of it.
type proxyServer struct {
	*testing.T
	mu sync.Mutex
	// name is what the ConfigMap is called, and uid its UID; the text is under key.
	name, key, uid, text string
	// forbidden are the names of those that nobody may read.
	forbidden  []string
	kubeconfig string
}

func newProxyServer(t *testing.T, name, key, uid string) *proxyServer {
	s := &proxyServer{T: t, name: name, key: key, uid: uid, text: "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack:\n  min: 100\n"}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	s.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	write(t, s.kubeconfig, fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n", web.URL))
	return s
}

func (s *proxyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/kube-system/configmaps/")
	for _, f := range s.forbidden {
		if name == f {
			kubetest.Refuse(w, http.StatusForbidden, "Forbidden", name+" is forbidden")
			return
		}
	}
	if name != s.name {
		kubetest.Refuse(w, http.StatusNotFound, "NotFound", name+" not found")
		return
	}
	if r.Method == http.MethodPatch {
		var patch struct{ Data map[string]string }
		if err := json.NewDecoder(r.Body).Decode(&patch); err != nil {
			s.Error(err)
		}
		s.text = patch.Data[s.key]
	}
	w.Header().Set("Content-Type", "application/json")
	about := map[string]string{"namespace": "kube-system", "name": name, "uid": s.uid, "resourceVersion": "1"}
	err := json.NewEncoder(w).Encode(map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": map[string]string{s.key: s.text}})
	if err != nil {
		s.Error(err)
	}
}

// min is what the configuration has now.
func (s *proxyServer) min() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, is, _ := strings.Cut(s.text, "min: ")
	return strings.TrimSpace(is)
}

// step is one of `tune apply --source kube:` from what is there.
func (s *proxyServer) step(t *tuning, to string) tune.Step {
	s.Helper()
	store := &proxyStore{ctx: s.Context(), settings: t.from.kube()}
	from, err := store.Read("conntrack.min")
	if err != nil {
		s.Fatal(err)
	}
	return tune.Step{ID: "conntrack", Place: tune.Place{Name: store.text.String(), Path: t.from.way(), Cookie: number(store.text)}, Setting: "conntrack.min", From: from, To: to}
}

// Whoever may not read one of the places of the configuration does not know that there is
// none.
func TestProxyStoreKnowsWhatIsAbsent(t *testing.T) {
	s := newProxyServer(t, "kube-proxy-config", "config", "1")
	read := func() error {
		return (&proxyStore{ctx: t.Context(), settings: kube.Settings{Kubeconfig: s.kubeconfig}}).read()
	}
	if err := read(); err != nil {
		t.Errorf("Amazon EKS: %v", err)
	}
	s.forbidden = []string{"kube-proxy-config"}
	if err := read(); err == nil || kube.Absent(err) || !strings.Contains(err.Error(), "it takes the verb get for configmaps in kube-system") {
		t.Errorf("one is absent, one forbidden: %v", err)
	}
	s.forbidden, s.name = nil, "other"
	if err := read(); !kube.Absent(err) || !strings.Contains(err.Error(), "get ConfigMap kube-system/kube-proxy at") || !strings.Contains(err.Error(), "this cluster has no kube-proxy, or it has its configuration elsewhere") {
		t.Errorf("both are absent: %v", err)
	}
}

// A setting of this host that cannot be set takes back what was set in the cluster for it,
// and nothing of what earlier ones or other clusters have.
func TestApplyStepsTakesBackItsOwn(t *testing.T) {
	one, other := newProxyServer(t, "kube-proxy", configKey, "1"), newProxyServer(t, "kube-proxy", configKey, "2")
	tuned := &tuning{at: place{run: filepath.Join(t.TempDir(), "tune"), procSys: t.TempDir()}}
	for _, s := range []*proxyServer{one, other} {
		tuned.from.source = "kube:" + s.kubeconfig
		if _, err := tuned.applySteps(t.Context(), []tune.Step{s.step(tuned, "200")}); err != nil {
			t.Fatal(err)
		}
	}
	tuned.from.source = "kube:" + one.kubeconfig
	absent := tune.Step{ID: "jit", Place: tune.Place{Name: "node"}, Setting: "net.core.bpf_jit_enable", From: "0", To: "1"}
	_, err := tuned.applySteps(t.Context(), []tune.Step{absent, one.step(tuned, "300")})
	if err == nil || !strings.Contains(err.Error(), "net.core.bpf_jit_enable") {
		t.Errorf("%v", err)
	}
	if one.min() != "200" || other.min() != "200" {
		t.Errorf("the clusters have %s and %s, not 200 as before", one.min(), other.min())
	}
	// Undone in the one; the other's is written down until it is reached.
	if done, err := tuned.objects(t.Context()).Undo(nil, false); err == nil || len(done) != 1 || one.min() != "100" || other.min() != "200" {
		t.Errorf("%v, %v: %s and %s", done, err, one.min(), other.min())
	}
	tuned.from.source = "" // as it was said then
	if done, err := tuned.objects(t.Context()).Undo(nil, false); err != nil || len(done) != 1 || other.min() != "100" {
		t.Errorf("%v, %v: %s", done, err, other.min())
	}
	if _, err := os.Stat(tuned.at.run); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}
