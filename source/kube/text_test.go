package kube

import (
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// Who would put back what others write is known by what they leave on their objects.
func TestOwner(t *testing.T) {
	applied := func(manager, fields string) []metav1.ManagedFieldsEntry {
		return []metav1.ManagedFieldsEntry{{Manager: manager, Operation: metav1.ManagedFieldsOperationApply, FieldsV1: metav1.NewFieldsV1(fields)}}
	}
	for _, row := range []struct {
		what       string
		o          metav1.ObjectMeta
		who, where string
	}{
		{"a person's", metav1.ObjectMeta{Labels: map[string]string{"app": "kube-proxy"}, Annotations: map[string]string{"kubeadm.kubernetes.io/component-config.hash": "sha256:1"}}, "", ""},
		{"kubeadm's", metav1.ObjectMeta{ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubeadm", Operation: metav1.ManagedFieldsOperationUpdate,
			FieldsV1: metav1.NewFieldsV1(`{"f:data":{"f:config.conf":{}}}`)}}}, "", ""},
		{"Argo CD", metav1.ObjectMeta{Annotations: map[string]string{"argocd.argoproj.io/tracking-id": "net:/ConfigMap:kube-system/kube-proxy"}},
			"Argo CD (annotation argocd.argoproj.io/tracking-id: net:/ConfigMap:kube-system/kube-proxy)", "in the repository of that application"},
		{"Flux", metav1.ObjectMeta{Labels: map[string]string{"kustomize.toolkit.fluxcd.io/name": "net"}}, "Flux (label kustomize.toolkit.fluxcd.io/name: net)", "in the repository of that Kustomization"},
		{"Helm", metav1.ObjectMeta{Labels: map[string]string{"app.kubernetes.io/managed-by": "Helm"}, Annotations: map[string]string{"meta.helm.sh/release-name": "proxy"}},
			"Helm (annotation meta.helm.sh/release-name: proxy)", "in the values of that release"},
		{"another tool", metav1.ObjectMeta{Labels: map[string]string{"app.kubernetes.io/managed-by": "pulumi"}}, "another tool (label app.kubernetes.io/managed-by: pulumi)", "where that has it from"},
		{"the addon manager", metav1.ObjectMeta{Labels: map[string]string{"addonmanager.kubernetes.io/mode": "Reconcile"}},
			"the addon manager (label addonmanager.kubernetes.io/mode: Reconcile)", "in its folder on the control plane's nodes"},
		{"what it made once", metav1.ObjectMeta{Labels: map[string]string{"addonmanager.kubernetes.io/mode": "EnsureExists"}}, "", ""},
		{"kubectl apply", metav1.ObjectMeta{Annotations: map[string]string{"kubectl.kubernetes.io/last-applied-configuration": strings.Repeat("x", 1000)}},
			"somebody with `kubectl apply` (annotation kubectl.kubernetes.io/last-applied-configuration: ...)", "in the file that they apply"},
		{"its owner", metav1.ObjectMeta{OwnerReferences: []metav1.OwnerReference{{Kind: "Addon", Name: "proxy"}}}, "Addon proxy, which owns it (ownerReferences)", "there"},
		{"who applies the key", metav1.ObjectMeta{ManagedFields: applied("rancher", `{"f:data":{"f:config.conf":{}}}`)}, "rancher, which applies it (managedFields)", "where that has it from"},
		{"who applies another", metav1.ObjectMeta{ManagedFields: applied("rancher", `{"f:data":{"f:kubeconfig.conf":{}},"f:metadata":{}}`)}, "", ""},
		{"ourselves", metav1.ObjectMeta{ManagedFields: applied(fieldManager, `{"f:data":{"f:config.conf":{}}}`)}, "", ""},
	} {
		if who, where := owner(&row.o, "config.conf"); who != row.who || where != row.where {
			t.Errorf("%s: %q, %q; want %q, %q", row.what, who, where, row.who, row.where)
		}
	}
}

// Reading and writing say what they lack, and whom to ask; a server that is away leaves
// the next one to be asked.
func TestText(t *testing.T) {
	b := newBed(t)
	b.apply(configMap)
	at := func(servers ...string) Settings {
		return Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: servers}
	}
	text, err := ReadText(t.Context(), at("http://127.0.0.1:1", b.url), "kube-system", "kube-proxy", "config.conf")
	if err != nil || text.Is != "kind: KubeProxyConfiguration" || text.String() != "ConfigMap kube-system/kube-proxy" || text.Owner != "" {
		t.Fatalf("%+v, %v", text, err)
	}
	for name, key := range map[string]string{"absent": "config.conf", "kube-proxy": "other"} {
		if _, err := ReadText(t.Context(), at(b.url), "kube-system", name, key); !Absent(err) || errors.Is(err, ErrNoAnswer) {
			t.Errorf("%s, %s: %v", name, key, err)
		}
	}
	if _, err := ReadText(t.Context(), at("http://127.0.0.1:1"), "kube-system", "kube-proxy", "config.conf"); !errors.Is(err, ErrNoAnswer) || Absent(err) {
		t.Errorf("nobody there: %v", err)
	}
	code, reason := http.StatusForbidden, metav1.StatusReasonForbidden
	var sent string
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch {
			body, _ := io.ReadAll(r.Body)
			sent = r.URL.String() + " " + r.Header.Get("Content-Type") + " " + string(body)
		}
		kubetest.Refuse(w, code, reason, "no")
		return true
	})
	_, err = ReadText(t.Context(), at(b.url), "kube-system", "kube-proxy", "config.conf")
	if err == nil || !strings.Contains(err.Error(), "it takes the verb get for configmaps in kube-system: ask who gives out roles in this cluster") {
		t.Errorf("forbidden: %v", err)
	}
	err = text.Replace(t.Context(), at(b.url), "other")
	if err == nil || errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "it takes the verb patch for configmaps in kube-system") {
		t.Errorf("forbidden: %v", err)
	}
	if want := `/api/v1/namespaces/kube-system/configmaps/kube-proxy?fieldManager=millrace application/merge-patch+json {"data":{"config.conf":"other"},"metadata":{"resourceVersion":"` + text.version + `"}}`; sent != want {
		t.Errorf("sent %s, want %s", sent, want)
	}
	code, reason = http.StatusConflict, metav1.StatusReasonConflict
	if err := text.Replace(t.Context(), at(b.url), "other"); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "plan again") {
		t.Errorf("a conflict: %v", err)
	}
	if err := text.Replace(t.Context(), at("http://127.0.0.1:1"), "other"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
}

// A real API server takes the text of who has read it last, and no other; test/cluster
// runs this on its own.
func TestTextOfARealServer(t *testing.T) {
	config := os.Getenv("MILLRACE_KUBECONFIG")
	if config == "" {
		t.Skip("MILLRACE_KUBECONFIG names no cluster: TestTuneOfARealConfigMap runs it")
	}
	at := Settings{Kubeconfig: config}
	read := func() *Text {
		t.Helper()
		text, err := ReadText(t.Context(), at, "default", "text", "a")
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	first, second := read(), read()
	if err := second.Replace(t.Context(), at, "2"); err != nil {
		t.Fatal(err)
	}
	if err := first.Replace(t.Context(), at, "1"); !errors.Is(err, ErrChanged) {
		t.Errorf("what was changed since: %v", err)
	}
	if now := read(); now.Is != "2" || now.UID != first.UID {
		t.Errorf("%+v", now)
	}
}
