package kube

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/source/kube/kubetest"
)

const configMap = `
apiVersion: v1
kind: ConfigMap
metadata: {name: kube-proxy, namespace: kube-system}
data: {config.conf: "kind: KubeProxyConfiguration"}
---
`

// A server that is away leaves the next one to be asked; one that answers decides,
// and somebody who may wait is told that from somebody who may not.
func TestConfigMap(t *testing.T) {
	b := newBed(t)
	b.apply(configMap)
	get := func(name, key string, servers ...string) (string, error) {
		data, err := ConfigMap(t.Context(), Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: servers}, "kube-system", name, key)
		return string(data), err
	}
	if text, err := get("kube-proxy", "config.conf", "http://127.0.0.1:1", b.url); err != nil || text != "kind: KubeProxyConfiguration" {
		t.Errorf("%q, %v", text, err)
	}
	for want, ask := range map[string]func() (string, error){
		"get ConfigMap kube-system/absent at " + b.url + ": ":                                        func() (string, error) { return get("absent", "config.conf", b.url) },
		"get ConfigMap kube-system/kube-proxy at " + b.url + ": kubeconfig.conf: it has no such key": func() (string, error) { return get("kube-proxy", "kubeconfig.conf", b.url) },
	} {
		if _, err := ask(); err == nil || errors.Is(err, ErrNoAnswer) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := get("kube-proxy", "config.conf", "http://127.0.0.1:1"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
	code, reason := http.StatusForbidden, metav1.StatusReasonForbidden
	b.Fault(func(w http.ResponseWriter, _ *http.Request) bool {
		kubetest.Refuse(w, code, reason, "no")
		return true
	})
	if _, err := get("kube-proxy", "config.conf", b.url); err == nil || errors.Is(err, ErrNoAnswer) {
		t.Errorf("forbidden: %v", err)
	}
	code, reason = http.StatusInternalServerError, metav1.StatusReasonInternalError
	if _, err := get("kube-proxy", "config.conf", b.url); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("a server that is not well: %v", err)
	}
}
