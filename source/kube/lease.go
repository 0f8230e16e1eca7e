package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// ErrChanged says that somebody has altered an object since it was read.
var ErrChanged = errors.New("somebody has changed it since it was read")

// Lease is an object of coordination.k8s.io/v1, as far as several processes tell each
// other by it.
type Lease struct {
	Annotations map[string]string
	// Holder is whose it is, Renewed when they last said so (RFC 3339).
	Holder, Renewed string

	path, version string
}

// leaseObject is its form.
type leaseObject struct {
	Metadata struct {
		ResourceVersion string            `json:"resourceVersion"`
		Annotations     map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		HolderIdentity string `json:"holderIdentity"`
		RenewTime      string `json:"renewTime"`
	} `json:"spec"`
}

// ReadLease gets a Lease. It asks one server after the other, each once, and needs the
// verb get for that one object.
func ReadLease(ctx context.Context, settings Settings, namespace, name string) (l *Lease, err error) {
	path := "/apis/coordination.k8s.io/v1/namespaces/" + namespace + "/leases/" + name
	err = askEach(settings, "get Lease "+namespace+"/"+name, func(at *server) (decided bool, err error) {
		data, err := at.ask(ctx, http.MethodGet, path, "", nil)
		if err != nil {
			return answered(err), err
		}
		o := leaseObject{}
		if err := json.Unmarshal(data, &o); err != nil {
			return true, err
		}
		l = &Lease{o.Metadata.Annotations, o.Spec.HolderIdentity, o.Spec.RenewTime, path, o.Metadata.ResourceVersion}
		return true, nil
	})
	return l, err
}

// Write writes what is in the Lease, if it is still as it was read: else the error is
// ErrChanged. An empty annotation is taken away; others than those that are named stay.
// It needs the verb patch for that one object.
func (l *Lease) Write(ctx context.Context, settings Settings) error {
	annotations := map[string]any{}
	for key, value := range l.Annotations {
		annotations[key] = value
		if value == "" {
			annotations[key] = nil
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": l.version, "annotations": annotations},
		"spec":     map[string]any{"holderIdentity": l.Holder, "renewTime": l.Renewed},
	})
	if err != nil {
		return err
	}
	return askEach(settings, "alter Lease "+l.path, func(at *server) (decided bool, err error) {
		_, err = at.ask(ctx, http.MethodPatch, l.path, string(types.MergePatchType), patch)
		if apierrors.IsConflict(err) {
			err = fmt.Errorf("%w: %w", ErrChanged, err)
		}
		return err == nil || answered(err), err
	})
}

// ask sends a request and returns the answer as JSON.
func (s *server) ask(ctx context.Context, verb, path, form string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	request := s.client.Verb(verb).AbsPath(path).MaxRetries(0).SetHeader("Accept", runtime.ContentTypeJSON)
	if body != nil {
		request = request.SetHeader("Content-Type", form).Body(body)
	}
	answer := request.Do(ctx)
	if err := answer.Error(); err != nil {
		return nil, err // the server's words, where it has some
	}
	return answer.Raw()
}

// Labelled says whether the Node of the settings has labels that a selector such as
// "pool=canary" asks for. It needs the verb get for the Node.
func Labelled(ctx context.Context, settings Settings, selector string) (is bool, err error) {
	wanted, err := labels.Parse(selector)
	if err != nil {
		return false, fmt.Errorf("%q selects no labels: %w", selector, err)
	}
	err = askEach(settings, "get Node "+settings.Node, func(at *server) (decided bool, err error) {
		data, err := at.ask(ctx, http.MethodGet, "/api/v1/nodes/"+settings.Node, "", nil)
		if err != nil {
			return answered(err), err
		}
		o := metav1.PartialObjectMetadata{}
		err = json.Unmarshal(data, &o)
		is = wanted.Matches(labels.Set(o.Labels))
		return true, err
	})
	return is, err
}
