package kube

import (
	"context"
	"encoding/json"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
)

// Scale is how many pods a Deployment is to have, as it was at a moment.
type Scale struct {
	Namespace, Name string
	// UID tells the object from one of the same name that is made after it.
	UID string
	// Replicas are those that are asked for.
	Replicas int
	// Owner is who keeps the Deployment and would put back what somebody else writes, ""
	// for nobody; Where says where it is to be changed then.
	Owner, Where string

	version string
}

// String is "Deployment kube-system/coredns".
func (s *Scale) String() string { return "Deployment " + s.Namespace + "/" + s.Name }

// ReadScale reads a Deployment's number of replicas. It asks one server after the other, each
// once, and needs the verb get for that one object. The error is ErrNoAnswer where none has
// said anything; Absent says that there is no such Deployment.
func ReadScale(ctx context.Context, settings Settings, namespace, name string) (s *Scale, err error) {
	err = askEach(settings, "get Deployment "+namespace+"/"+name, func(at *server) (decided bool, err error) {
		s, err = at.readScale(ctx, namespace, name)
		return answered(err), allowedFor(err, "get", "deployments", namespace)
	})
	return s, err
}

func (s *server) readScale(ctx context.Context, namespace, name string) (*Scale, error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	text, err := s.client.Get().AbsPath("/apis/apps/v1/namespaces", namespace, "deployments", name).
		SetHeader("Accept", "application/json").MaxRetries(0).Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	var found appsv1.Deployment
	if err := json.Unmarshal(text, &found); err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	scale := &Scale{Namespace: namespace, Name: name, UID: string(found.UID), Replicas: 1, version: found.ResourceVersion}
	if found.Spec.Replicas != nil {
		scale.Replicas = int(*found.Spec.Replicas)
	}
	scale.Owner, scale.Where = owner(&found.ObjectMeta, "")
	return scale, nil
}

// Set writes another number of replicas, and nothing else of the object. It fails with
// ErrChanged if the object is not as it was read, whatever has changed of it. It needs the
// verb patch for that one object.
func (s *Scale) Set(ctx context.Context, settings Settings, replicas int) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]string{"resourceVersion": s.version},
		"spec":     map[string]int{"replicas": replicas},
	})
	if err != nil {
		return fmt.Errorf("patch %s: %w", s, err)
	}
	return askEach(settings, "patch "+s.String(), func(at *server) (decided bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, answerPatience)
		defer cancel()
		_, err = at.client.Patch(types.MergePatchType).AbsPath("/apis/apps/v1/namespaces", s.Namespace, "deployments", s.Name).
			SetHeader("Accept", "application/json").Param("fieldManager", fieldManager).MaxRetries(0).Body(patch).Do(ctx).Raw()
		if apierrors.IsConflict(err) {
			return true, fmt.Errorf("%w: plan again (%w)", ErrChanged, err)
		}
		return answered(err), allowedFor(err, "patch", "deployments", s.Namespace)
	})
}
