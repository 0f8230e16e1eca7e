package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// The patch takes the one key away, however often it is there, and names what has to be
// there still.
func TestPatchOfATaint(t *testing.T) {
	const key = "node.millrace.io/agent-not-ready"
	other := corev1.Taint{Key: "example.com/gpu", Value: "yes", Effect: corev1.TaintEffectNoSchedule}
	ours := corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule}
	again := corev1.Taint{Key: key, Effect: corev1.TaintEffectNoExecute}
	for _, row := range []struct {
		taints []corev1.Taint
		want   string
	}{
		{nil, ""},
		{[]corev1.Taint{other}, ""},
		{[]corev1.Taint{ours}, `[{"op":"test","path":"/spec/taints","value":[{"key":"` + key + `","effect":"NoSchedule"}]},{"op":"remove","path":"/spec/taints"}]`},
		{[]corev1.Taint{ours, other, again}, `[{"op":"test","path":"/spec/taints","value":[{"key":"` + key + `","effect":"NoSchedule"},` +
			`{"key":"example.com/gpu","value":"yes","effect":"NoSchedule"},{"key":"` + key + `","effect":"NoExecute"}]},` +
			`{"op":"replace","path":"/spec/taints","value":[{"key":"example.com/gpu","value":"yes","effect":"NoSchedule"}]}]`},
	} {
		if got := string(withoutTaint(row.taints, key)); got != row.want {
			t.Errorf("%v: %s, not %s", row.taints, got, row.want)
		}
	}
}

// What a real API server makes of it is tested on the cluster (test/cluster).
func TestRemoveTaint(t *testing.T) {
	b := newBed(t)
	node := corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	node.Spec.Taints = []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectNoSchedule}}
	var asked []string
	refuse := func(w http.ResponseWriter, r *http.Request) bool { return false }
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		asked = append(asked, strings.TrimSpace(fmt.Sprintf("%s %s %s", r.Method, r.URL.Path, r.Header.Get("Content-Type"))))
		if refuse(w, r) {
			return true
		}
		if r.Method == http.MethodPatch {
			var steps []step
			if err := json.Unmarshal(body, &steps); err != nil || len(steps) != 2 {
				t.Errorf("the patch is %s: %v", body, err)
			}
			node.Spec.Taints = nil
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(corev1.NodeList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, Items: []corev1.Node{node}})
		return true
	})
	take := func(servers ...string) (bool, error) {
		asked = nil
		return RemoveTaint(t.Context(), Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: servers, Node: "n1"}, "k")
	}
	if was, err := take("http://127.0.0.1:1", b.url); err != nil || !was || strings.Join(asked, ", ") != "GET /api/v1/nodes, PATCH /api/v1/nodes/n1 application/json-patch+json" {
		t.Errorf("taken off: %v, %v after %q", was, err, asked)
	}
	if was, err := take(b.url); err != nil || was || len(asked) != 1 {
		t.Errorf("again: %v, %v after %q", was, err, asked)
	}
	refuse = func(w http.ResponseWriter, _ *http.Request) bool {
		kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "no")
		return true
	}
	if _, err := take(b.url); err == nil || errors.Is(err, ErrNoAnswer) || !strings.HasPrefix(err.Error(), "take the taint k off Node n1 at "+b.url) {
		t.Errorf("forbidden: %v", err)
	}
	if _, err := take("http://127.0.0.1:1"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
}
