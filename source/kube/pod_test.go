package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podServer is an API server that makes pods, runs them as it is told, and deletes them.
type podServer struct {
	mu      sync.Mutex
	made    corev1.Pod
	there   bool
	did     []string
	refuses metav1.Status
	keeps   bool
	// becomes is what a pod is when it is asked for the nth time.
	becomes func(n int) corev1.PodStatus
	asked   int
}

func (s *podServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	const folder = "/api/v1/namespaces/kube-system/pods"
	refuse := func(code int, reason metav1.StatusReason, text string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: int32(code), Reason: reason, Message: text})
	}
	if !s.is("GET", r) || strings.HasSuffix(r.URL.Path, "/log") {
		s.did = append(s.did, r.Method+" "+strings.ReplaceAll(r.URL.Path, s.made.Name, "NAME"))
	}
	switch {
	case r.URL.Path == folder && r.Method == "POST" && s.refuses.Code != 0:
		refuse(int(s.refuses.Code), s.refuses.Reason, s.refuses.Message)
	case r.URL.Path == folder && r.Method == "POST" && s.there:
		refuse(409, metav1.StatusReasonAlreadyExists, "it is there")
	case r.URL.Path == folder && r.Method == "POST":
		body, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &s.made); err != nil {
			refuse(400, metav1.StatusReasonBadRequest, err.Error())
			return
		}
		s.there = true
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	case !s.there || !strings.HasPrefix(r.URL.Path, folder+"/"+s.made.Name):
		refuse(404, metav1.StatusReasonNotFound, "no such pod")
	case r.Method == "DELETE" && s.keeps:
		refuse(500, metav1.StatusReasonInternalError, "etcd is away")
	case r.Method == "DELETE":
		s.there = false
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.made)
	case strings.HasSuffix(r.URL.Path, "/log"):
		fmt.Fprint(w, "read 3 network namespaces\n{\n}\n")
	default:
		s.asked++
		s.made.Status = s.becomes(s.asked)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.made)
	}
}

func (s *podServer) is(method string, r *http.Request) bool { return r.Method == method }

func ended(status int32) corev1.PodStatus {
	return corev1.PodStatus{Phase: corev1.PodSucceeded, ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: status}}}}}
}

func waits(reason, message string) corev1.PodStatus {
	return corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}}
}

// However the pod ends, and whoever gives up, it is deleted; and what stopped it is said.
func TestErrand(t *testing.T) {
	for _, row := range []struct {
		what     string
		server   *podServer
		patience time.Duration
		status   int
		says     string
		left     bool
	}{
		{what: "it ends", server: &podServer{becomes: func(n int) corev1.PodStatus {
			if n == 1 {
				return waits("ContainerCreating", "")
			}
			return ended(2)
		}}, status: 2},
		{what: "no image", server: &podServer{becomes: func(int) corev1.PodStatus { return waits("ErrImagePull", "not found: x/y:z") }}, says: "on node n1: ErrImagePull: not found: x/y:z"},
		{what: "the kubelet refuses", server: &podServer{becomes: func(int) corev1.PodStatus {
			return corev1.PodStatus{Phase: corev1.PodFailed, Reason: "OutOfpods", Message: "too many"}
		}}, says: "it ended as Failed: OutOfpods too many"},
		{what: "its time is over", server: &podServer{becomes: func(int) corev1.PodStatus { return waits("ContainerCreating", "") }}, patience: 5 * time.Second, says: "it has not ended in 5s; its phase is Pending, ContainerCreating"},
		{what: "admission", server: &podServer{refuses: metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden, Message: `violates PodSecurity "baseline:latest"`}},
			says: `violates PodSecurity "baseline:latest": it takes the verb create for pods in kube-system, and that this namespace admits pods of the level privileged`},
		{what: "a wrong name", server: &podServer{refuses: metav1.Status{Code: 422, Reason: metav1.StatusReasonInvalid, Message: "image: Invalid value"}}, says: "image: Invalid value"},
		{what: "it cannot be deleted", server: &podServer{keeps: true, becomes: func(int) corev1.PodStatus { return ended(0) }}, left: true,
			says: "kubectl -n kube-system delete pods -l app.kubernetes.io/name=millrace-doctor removes it; it ends by itself after 1m0s"},
	} {
		t.Run(row.what, func(t *testing.T) {
			web := httptest.NewServer(row.server)
			defer web.Close()
			if row.patience == 0 {
				row.patience = time.Minute
			}
			e := NewErrand("n1", "x/y:z", []string{"doctor", "-o", "json"}, row.patience)
			out, status, err := e.Run(t.Context(), Settings{Kubeconfig: kubeconfig(t, web.URL)})
			if row.says == "" && (err != nil || status != row.status || string(out) != "read 3 network namespaces\n{\n}\n") {
				t.Errorf("%v, status %d: %q", err, status, out)
			}
			if row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
				t.Errorf("%v; it does not say %q", err, row.says)
			}
			if row.server.there != row.left {
				t.Errorf("the pod is there: %v; asked for was %q", row.server.there, row.server.did)
			}
			refused := row.server.refuses.Code != 0
			if deleted := slices.Contains(row.server.did, "DELETE /api/v1/namespaces/kube-system/pods/NAME"); deleted == refused {
				t.Errorf("deleted: %v: %q", deleted, row.server.did)
			}
		})
	}
}

// A pod that one server made without saying so is not left because another refuses: where
// that says it is there, it is used.
func TestErrandThatWasMadeUnheard(t *testing.T) {
	for _, row := range []struct {
		refuses metav1.Status
		says    string
	}{
		{},
		{metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden, Message: "not you"}, "not you: it takes the verb create"},
		{metav1.Status{Code: 401, Reason: metav1.StatusReasonUnauthorized, Message: "who are you?"}, "who are you?"},
	} {
		s := &podServer{becomes: func(int) corev1.PodStatus { return ended(2) }}
		mute := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				s.ServeHTTP(httptest.NewRecorder(), r)
				s.mu.Lock()
				s.refuses = row.refuses // of the next
				s.mu.Unlock()
			}
			panic(http.ErrAbortHandler)
		}))
		defer mute.Close()
		web := httptest.NewServer(s)
		defer web.Close()
		_, status, err := NewErrand("n1", "x", nil, time.Minute).Run(t.Context(), Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{mute.URL, web.URL}})
		if row.says == "" && (err != nil || status != 2) {
			t.Errorf("it is there: %v, status %d", err, status)
		}
		if row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%v; it does not say %q", err, row.says)
		}
		if s.made.Name == "" || s.there {
			t.Errorf("after %q the pod %q is there: %v; asked for was %q", row.says, s.made.Name, s.there, s.did)
		}
	}
}

// A server that does not answer takes no time from the next to delete the pod.
func TestErrandIsDeletedByTheSecondServer(t *testing.T) {
	t.Parallel() // it waits for most of its time
	s, e := &podServer{there: true}, NewErrand("n1", "x", nil, time.Minute)
	s.made.Name = e.name
	done := make(chan struct{})
	mute := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-done }))
	defer mute.Close()
	defer close(done)
	web := httptest.NewServer(s)
	defer web.Close()
	if err := e.remove(t.Context(), Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{mute.URL, web.URL}}); err != nil || s.there {
		t.Errorf("%v; the pod is there: %v", err, s.there)
	}
}

// Who gives up leaves no pod.
func TestErrandIsDeletedWhenItsCallerEnds(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	s := &podServer{}
	s.becomes = func(int) corev1.PodStatus {
		cancel(errors.New("enough"))
		return waits("ContainerCreating", "")
	}
	web := httptest.NewServer(s)
	defer web.Close()
	_, _, err := NewErrand("n1", "x", nil, time.Minute).Run(ctx, Settings{Kubeconfig: kubeconfig(t, web.URL)})
	if err == nil || !strings.Contains(err.Error(), "enough") || s.there {
		t.Errorf("%v; the pod is there: %v", err, s.there)
	}
}

// The pod has what looking into a node takes, and nothing else.
func TestErrandIsRestricted(t *testing.T) {
	var p corev1.Pod
	if err := json.Unmarshal(NewErrand("n1", "x/y:z", []string{"doctor"}, 62*time.Second).Manifest(), &p); err != nil {
		t.Fatal(err)
	}
	c := p.Spec.Containers[0]
	can := c.SecurityContext
	if len(p.Spec.Containers) != 1 || *can.Privileged || *can.AllowPrivilegeEscalation || !*can.ReadOnlyRootFilesystem ||
		!slices.Equal(can.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(can.Capabilities.Add, []corev1.Capability{"NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"}) {
		t.Errorf("container %+v", c)
	}
	if *p.Spec.AutomountServiceAccountToken || *p.Spec.ActiveDeadlineSeconds != 62 || p.Spec.RestartPolicy != corev1.RestartPolicyNever || p.Spec.NodeName != "n1" {
		t.Errorf("pod %+v", p.Spec)
	}
	for _, m := range c.VolumeMounts {
		if !m.ReadOnly {
			t.Errorf("it can write to %s", m.MountPath)
		}
	}
}
