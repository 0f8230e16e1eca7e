package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// answering is a server that answers each request by a function, and the settings for it.
func answering(t *testing.T, answer func(r *http.Request, body []byte) (status int, text string)) Settings {
	t.Helper()
	b := newBed(t)
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		status, text := answer(r, body)
		switch status {
		case http.StatusConflict:
			kubetest.Refuse(w, status, metav1.StatusReasonConflict, text)
		case http.StatusNotFound:
			kubetest.Refuse(w, status, metav1.StatusReasonNotFound, text)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			io.WriteString(w, text)
		}
		return true
	})
	return Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{"http://127.0.0.1:1", b.url}, Node: "n1"}
}

// A Lease is written only as it was read, and what others have in it stays. What a real
// API server makes of it is tested in test/cluster.
func TestLease(t *testing.T) {
	var sent string
	conflict := false
	settings := answering(t, func(r *http.Request, body []byte) (int, string) {
		if r.URL.Path != "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/millrace-tune" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		if r.Method == http.MethodPatch {
			sent = r.Header.Get("Content-Type") + " " + string(body)
			if conflict {
				return http.StatusConflict, "the object has been modified"
			}
		}
		return http.StatusOK, `{"metadata": {"resourceVersion": "7", "annotations": {"a": "1", "theirs": "x"}}, "spec": {"holderIdentity": "n0", "renewTime": "2026-11-22T00:00:00.000000Z"}}`
	})
	l, err := ReadLease(t.Context(), settings, "kube-system", "millrace-tune")
	if err != nil || l.Holder != "n0" || l.Annotations["a"] != "1" || l.Renewed != "2026-11-22T00:00:00.000000Z" {
		t.Fatalf("%+v, %v", l, err)
	}
	l.Annotations = map[string]string{"a": "2", "b": ""}
	l.Holder = "n1"
	err = l.Write(t.Context(), settings)
	want := `application/merge-patch+json {"metadata":{"annotations":{"a":"2","b":null},"resourceVersion":"7"},"spec":{"holderIdentity":"n1","renewTime":"2026-11-22T00:00:00.000000Z"}}`
	if err != nil || sent != want {
		t.Errorf("%v: sent %s, not %s", err, sent, want)
	}
	conflict = true
	if err := l.Write(t.Context(), settings); !errors.Is(err, ErrChanged) || errors.Is(err, ErrNoAnswer) {
		t.Errorf("one that was changed: %v", err)
	}
	settings.Servers = settings.Servers[:1]
	if _, err := ReadLease(t.Context(), settings, "kube-system", "millrace-tune"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
	if err := l.Write(t.Context(), settings); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
}

// An Event is written once, counted, and written anew when the API server has forgotten it.
func TestSay(t *testing.T) {
	var asked []string
	forgotten := false
	settings := answering(t, func(r *http.Request, body []byte) (int, string) {
		asked = append(asked, r.Method+" "+strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/default/events"))
		if r.Method == http.MethodPatch && forgotten {
			return http.StatusNotFound, "not found"
		}
		if r.Method == http.MethodPost {
			var e corev1.Event
			if err := json.Unmarshal(body, &e); err != nil || e.InvolvedObject.Name != "n1" || e.Type != "Warning" || e.Count != 2 || e.Source.Component != "millrace-tune" {
				t.Errorf("%v: %s", err, body)
			}
		}
		return http.StatusOK, "{}"
	})
	e := Event{Reason: "TuneDrift", Message: "m", Warning: true, Count: 2, First: time.Now(), Last: time.Now(), Component: "millrace-tune"}
	name, err := Say(t.Context(), settings, e)
	if err != nil || !strings.HasPrefix(name, "n1.") {
		t.Fatal(name, err)
	}
	e.Name = name
	if again, err := Say(t.Context(), settings, e); err != nil || again != name {
		t.Error(again, err)
	}
	forgotten = true
	if again, err := Say(t.Context(), settings, e); err != nil || again == name {
		t.Error(again, err)
	}
	if got, want := fmt.Sprint(asked), fmt.Sprintf("[POST  PATCH /%s PATCH /%s POST ]", name, name); got != want {
		t.Errorf("asked %s, not %s", got, want)
	}
}

// A Node's labels are asked for where a selector is given.
func TestLabelled(t *testing.T) {
	settings := answering(t, func(r *http.Request, _ []byte) (int, string) {
		if r.URL.Path != "/api/v1/nodes/n1" {
			return http.StatusNotFound, "not found"
		}
		return http.StatusOK, `{"metadata": {"labels": {"pool": "canary"}}}`
	})
	for selector, want := range map[string]bool{"pool=canary": true, "pool=other": false, "pool in (canary, x)": true, "!pool": false} {
		if is, err := Labelled(t.Context(), settings, selector); err != nil || is != want {
			t.Errorf("%s: %v, %v", selector, is, err)
		}
	}
	if _, err := Labelled(t.Context(), settings, "=="); err == nil || !strings.Contains(err.Error(), `"==" selects no labels`) {
		t.Error(err)
	}
	settings.Node = "n2"
	if _, err := Labelled(t.Context(), settings, "pool=canary"); err == nil || errors.Is(err, ErrNoAnswer) {
		t.Errorf("no such Node: %v", err)
	}
}
