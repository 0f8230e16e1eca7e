package kube

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// All objects are given, in as many pages as it takes; a kind that is not there, one that
// may not be asked for and a server that is away are told apart.
func TestObjects(t *testing.T) {
	b := newBed(t)
	nodes := ""
	for i := range objectsPage + 1 {
		nodes += fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: n%d}\n---\n", i)
	}
	b.apply(nodes)
	list := func(path string, servers ...string) (found int, err error) {
		api, err := OpenAPI(Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: servers})
		if err != nil {
			t.Fatal(err)
		}
		return found, api.Objects(t.Context(), path, func(object []byte) error {
			if strings.Contains(string(object), `"name":"n`) {
				found++
			}
			return nil
		})
	}
	if found, err := list("/api/v1/nodes", "http://127.0.0.1:1", b.url); err != nil || found < objectsPage+1 {
		t.Errorf("%d nodes, %v", found, err)
	}
	if _, err := list("/apis/example.org/v1/things", b.url); !errors.Is(err, ErrNoKind) {
		t.Errorf("a kind that is not there: %v", err)
	}
	if _, err := list("/api/v1/nodes", "http://127.0.0.1:1"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
	b.Fault(func(w http.ResponseWriter, _ *http.Request) bool {
		kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, `nodes is forbidden: User "u" cannot list resource "nodes"`)
		return true
	})
	if _, err := list("/api/v1/nodes", b.url); err == nil || errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), `cannot list resource "nodes"`) {
		t.Errorf("forbidden: %v", err)
	}
}
