package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// Event is something to be seen at the Node of the settings (`kubectl describe node`).
type Event struct {
	// Name is that of the object that says it already, empty for a new one.
	Name            string
	Reason, Message string
	Warning         bool
	Count           int
	First, Last     time.Time
	// Component is who says it.
	Component string
}

// eventNamespace is where Events of what has no namespace are.
const eventNamespace = metav1.NamespaceDefault

// Say writes an Event about the Node of the settings, or counts the one that was written
// before, and returns its name. An API server forgets Events, after an hour as a rule
// (--event-ttl): it is written anew then. It asks one server after the other, each once,
// and needs the verbs create and patch for events in the namespace default.
func Say(ctx context.Context, settings Settings, e Event) (name string, err error) {
	err = askEach(settings, "write an Event about Node "+settings.Node, func(at *server) (decided bool, err error) {
		if e.Name != "" {
			name, err = at.count(ctx, e)
			if err == nil || !apierrors.IsNotFound(err) {
				return err == nil || answered(err), err
			}
		}
		name, err = at.say(ctx, settings.Node, e)
		return err == nil || answered(err), err
	})
	return name, err
}

func (s *server) count(ctx context.Context, e Event) (string, error) {
	patch, err := json.Marshal(map[string]any{"count": e.Count, "lastTimestamp": metav1.NewTime(e.Last)})
	if err != nil {
		return "", err
	}
	_, err = s.ask(ctx, http.MethodPatch, "/api/v1/namespaces/"+eventNamespace+"/events/"+e.Name, string(types.MergePatchType), patch)
	return e.Name, err
}

func (s *server) say(ctx context.Context, node string, e Event) (string, error) {
	// The name is made as client-go's; a Node's Events have its name for a UID, as the
	// kubelet's do.
	o := corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: eventNamespace, Name: fmt.Sprintf("%s.%x", node, time.Now().UnixNano())},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: node, UID: types.UID(node)},
		Reason:         e.Reason, Message: e.Message, Type: corev1.EventTypeNormal,
		FirstTimestamp: metav1.NewTime(e.First), LastTimestamp: metav1.NewTime(e.Last), Count: int32(e.Count),
		Source: corev1.EventSource{Component: e.Component, Host: node}, ReportingController: e.Component, ReportingInstance: node,
	}
	if e.Warning {
		o.Type = corev1.EventTypeWarning
	}
	body, err := json.Marshal(o)
	if err == nil {
		_, err = s.ask(ctx, http.MethodPost, "/api/v1/namespaces/"+eventNamespace+"/events", runtime.ContentTypeJSON, body)
	}
	return o.Name, err
}
