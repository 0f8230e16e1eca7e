package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// serversCluster is an API server of a cluster with so many nodes of eight cores, and one
// Deployment of DNS servers, of which it takes patches.
type serversCluster struct {
	*testing.T
	mu         sync.Mutex
	nodes      int
	replicas   int
	labels     map[string]string
	autoscaled bool
	forbidden  bool
	kubeconfig string
}

func newServersCluster(t *testing.T, nodes, replicas int) *serversCluster {
	s := &serversCluster{T: t, nodes: nodes, replicas: replicas}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	s.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	write(t, s.kubeconfig, fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n", web.URL))
	return s
}

type fields = map[string]any

func (s *serversCluster) deployment() fields {
	return fields{
		"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": fields{"namespace": "kube-system", "name": "coredns", "uid": "u1", "resourceVersion": fmt.Sprint(s.replicas), "labels": s.labels},
		"spec":     fields{"replicas": s.replicas, "template": fields{"metadata": fields{"labels": fields{"k8s-app": "kube-dns"}}, "spec": fields{}}},
	}
}

func (s *serversCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := []fields{}
	answer := fields{"metadata": fields{"resourceVersion": "1"}}
	switch r.URL.Path {
	case "/apis/apps/v1/namespaces/kube-system/deployments/coredns":
		if r.Method == http.MethodPatch {
			if s.forbidden {
				kubetest.Refuse(w, http.StatusForbidden, "Forbidden", "no")
				return
			}
			var patch struct {
				Metadata struct{ ResourceVersion string }
				Spec     struct{ Replicas int }
			}
			if err := json.NewDecoder(r.Body).Decode(&patch); err != nil || patch.Metadata.ResourceVersion != fmt.Sprint(s.replicas) {
				kubetest.Refuse(w, http.StatusConflict, "Conflict", "it has changed")
				return
			}
			s.replicas = patch.Spec.Replicas
		}
		answer = s.deployment()
	case "/api/v1/nodes":
		for i := range s.nodes {
			items = append(items, fields{"metadata": fields{"name": fmt.Sprint("n", i)}, "status": fields{"capacity": fields{"cpu": "8"}}})
		}
	case "/api/v1/pods":
		for i := range s.replicas {
			items = append(items, fields{
				"metadata": fields{"namespace": "kube-system", "name": fmt.Sprint("coredns-", i), "labels": fields{"k8s-app": "kube-dns"}},
				"status":   fields{"phase": "Running", "conditions": []fields{{"type": "Ready", "status": "True"}}},
			})
		}
	case "/apis/apps/v1/deployments":
		items = append(items, s.deployment())
	case "/apis/autoscaling/v2/horizontalpodautoscalers":
		if s.autoscaled {
			items = append(items, fields{
				"metadata": fields{"namespace": "kube-system", "name": "coredns"},
				"spec":     fields{"scaleTargetRef": fields{"kind": "Deployment", "name": "coredns"}, "minReplicas": 1, "maxReplicas": 3},
			})
		}
	default:
		kubetest.Refuse(w, http.StatusNotFound, "NotFound", r.URL.Path)
		return
	}
	if answer["spec"] == nil {
		answer["items"] = items
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		s.Error(err)
	}
}

func (s *serversCluster) now() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replicas
}

func (s *serversCluster) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// DNS servers by the size of the cluster: said, set where it is asked for, shown, put back.
func TestTuneDNS(t *testing.T) {
	s := newServersCluster(t, 40, 1)
	run := filepath.Join(t.TempDir(), "tune")
	tune := func(wantStatus int, says string, args ...string) {
		t.Helper()
		args = append([]string{"tune"}, args...)
		stdout, stderr, status := millrace(t, append(args, "--source", "kube:"+s.kubeconfig)...)
		if status != wantStatus || !strings.Contains(stdout+stderr, says) {
			t.Errorf("%v: exit status %d, says %q %q, not %q", args, status, stdout, stderr, says)
		}
	}
	change := "~ spec.replicas 1 -> 3 (Deployment kube-system/coredns"
	tune(exitOK, change+"): 40 nodes with 320 cores want 3; 1 are ready", "dns")
	tune(exitOK, `"wanted": 3`, "dns", "-o", "json")
	tune(exitOK, "  minReplicas: 3\n  maxReplicas: 12\n", "dns", "hpa")
	tune(exitOK, change+", dns-servers)", "dns", "apply", "--dry-run", "--run", run)
	if s.now() != 1 {
		t.Fatalf("a dry run has set %d", s.now())
	}
	s.change(func() { s.forbidden = true })
	tune(exitFailed, "it takes the verb patch for deployments in kube-system", "dns", "apply", "--run", run)
	s.change(func() { s.forbidden = false })
	tune(exitOK, change+", dns-servers)", "dns", "apply", "--run", run)
	if s.now() != 3 {
		t.Fatalf("there are %d", s.now())
	}
	tune(exitOK, "spec.replicas", "status", "--run", run)
	tune(exitOK, "= spec.replicas 3", "dns", "apply", "--run", run) // again means nothing
	s.change(func() { s.replicas = 5 })
	tune(exitFindings, "5", "status", "--run", run)
	s.change(func() { s.replicas = 3 })
	tune(exitOK, "spec.replicas 3 -> 1", "undo", "dns-servers", "--run", run)
	if s.now() != 1 {
		t.Errorf("put back are %d", s.now())
	}
	s.change(func() { s.labels = map[string]string{"app.kubernetes.io/managed-by": "Helm"} })
	tune(exitIncomplete, "is kept by", "dns", "apply", "--run", run)
	s.change(func() { s.labels, s.autoscaled = nil, true })
	tune(exitIncomplete, "HorizontalPodAutoscaler kube-system/coredns sets it", "dns", "apply", "--run", run)
	tune(exitOK, "! spec.replicas 1", "dns")
	if s.now() != 1 {
		t.Errorf("refused, and there are %d", s.now())
	}
	// What the formula says of a cluster of one node, and of a wide one.
	for nodes, want := range map[int]string{1: "want 1", 2: "want 2", 100: "want 7"} {
		s.change(func() { s.nodes, s.autoscaled = nodes, false })
		tune(exitOK, want, "dns")
	}
	for _, args := range [][]string{{"dns", "nonsense"}, {"dns"}, {"dns", "apply"}} {
		if _, stderr, status := millrace(t, append([]string{"tune"}, args...)...); status != exitUsage {
			t.Errorf("%v: exit status %d, %s", args, status, stderr)
		}
	}
}
